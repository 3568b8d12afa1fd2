"""HiDream's whole pipeline: prompts to a picture, with four text encoders and a mixture of experts."""

from __future__ import annotations

import pytest
import torch

import moeca_compile
from tests.harness import own_warnings
from tests.pipelines.tiny import TEXT, diffusers, draw, hidream, steps_of

STEPS = 5
PROMPT = {"prompt": "a cat on the moon", "negative_prompt": "a dog", "max_sequence_length": TEXT, "side": None}


def test_prompts_become_the_pipelines_pictures_at_full_steps_and_experts_are_cached(enabled):
    pipe = hidream()
    plain = draw(pipe, STEPS, output_type="np", **PROMPT)
    exact = draw(pipe, STEPS, **PROMPT)
    other = draw(pipe, STEPS, **{**PROMPT, "prompt": "the moon on a dog"})
    assert (other - exact).norm() > 1e-3 * exact.norm(), "the texts count"

    model = enabled(pipe, "moeca", full_every=1)
    torch.testing.assert_close(draw(pipe, STEPS, **PROMPT), exact, atol=2e-6, rtol=1e-6)
    assert steps_of(model) == (STEPS, 0)

    enabled(pipe, "moeca", validate=True)
    cached = draw(pipe, STEPS, output_type="np", **PROMPT)
    assert plain.shape == cached.shape == (1, 8, 8, 3)
    assert 0 < abs(cached - plain).max() < 0.02
    assert steps_of(model) == (2, 3), "guidance is joined: a call a step"
    report = moeca_compile.report(model)
    cached_experts = [region.name for region in report.regions if region.kind == "experts"]
    assert cached_experts == ["double_stream_blocks.0.block.ff_i", "single_stream_blocks.0.block.ff_i"]
    assert {region.status for region in report.regions} == {"cached"}
    assert report.graph_breaks == () and own_warnings(report) == [] and report.reuse_ratio > 0.5
    assert report.cache_bytes == 0, "the picture is drawn"

    moeca_compile.disable(pipe)
    assert torch.equal(draw(pipe, STEPS, **PROMPT), exact)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of the scheduler's use of numpy
def test_oblong_pictures_several_a_prompt_and_the_multistep_solver_that_it_is_published_with(enabled):
    solver = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = hidream(solver)
    given = {**PROMPT, "height": 6, "width": 12, "num_images_per_prompt": 2}  # ten tokens and six of padding
    plain = draw(pipe, STEPS, **given)
    model = enabled(pipe, "moeca-forecast")
    cached = draw(pipe, STEPS, **given)
    assert cached.shape == (2, 4, 4, 10)
    assert 0 < (cached - plain).norm() < 0.05 * plain.norm()
    assert steps_of(model) == (2, 3) and moeca_compile.report(model).graph_breaks == ()
