"""LoRA adapters of an enabled pipeline: loaded, scaled, fused, swapped and taken away, by diffusers and peft."""

from __future__ import annotations

import pytest
import torch

import moeca_compile
from tests.harness import own_warnings
from tests.pipelines.adapters import Pair, adapter
from tests.pipelines.tiny import draw, flux, flux_inputs, steps_of

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]
TEXTS = {**flux_inputs(), "side": 16}


def test_full_steps_draw_the_pipelines_pictures_whatever_is_done_with_adapters(enabled):
    pair = Pair(flux, **TEXTS)
    pair.load("one", ("to_q", "to_v"), 1)
    model = enabled(pair.pipe, "stack", full_every=1)
    pair.compare()
    pair.load("two", ("to_q", "to_v"), 2)
    for weights in ([0.5, 0.25], [0.2, 0.7]):
        pair.do(lambda pipe, weights=weights: pipe.set_adapters(["one", "two"], weights))
        pair.compare()
    pair.do(lambda pipe: pipe.fuse_lora())
    pair.compare(changed=False)
    pair.do(lambda pipe: pipe.unfuse_lora())
    pair.compare(changed=False)
    pair.do(lambda pipe: pipe.unload_lora_weights())
    pair.compare()
    report = moeca_compile.report(model)
    assert steps_of(model) == (2 * 6, 0) and own_warnings(report) == [] and report.graph_breaks == ()


def test_adapters_that_take_each_others_place_compile_nothing_anew(enabled):
    pair = Pair(flux, **TEXTS)
    pair.do(lambda pipe: pipe.enable_lora_hotswap(target_rank=4))
    pair.load("one", ("to_q", "to_v"), 1)
    model = enabled(pair.pipe, "stack", full_every=1)
    pair.compare()
    for seed in (2, 3):
        pair.load("one", ("to_q", "to_v"), seed, hotswap=True)
        pair.compare()
    assert moeca_compile.report(model).graphs == 1


def test_a_denoiser_whose_code_dynamo_has_given_up_is_spoken_of_and_compiled_anew(enabled):
    pipe = flux()
    model = enabled(pipe)
    draw(pipe, 2, **TEXTS)
    with torch._dynamo.config.patch(recompile_limit=1):
        pipe.load_lora_weights(adapter(model, ("to_q",), 1), "one")
        with pytest.warns(UserWarning, match=r"'transformer' of FluxPipeline ran as plain .*recompile_limit, now 1"):
            draw(pipe, 2, **TEXTS)
        assert steps_of(model) == (1, 1)
        draw(pipe, 2, **TEXTS)
    assert steps_of(model) == (2, 2)
    assert len(own_warnings(moeca_compile.report(model))) == 1
