"""Hooks that move weights: accelerate's and diffusers' own, with a CPU in the place of the accelerator."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import moeca_compile
from tests.harness import own_warnings
from tests.pipelines.tiny import diffusers, draw, flux, flux_inputs, steps_of

accelerate = pytest.importorskip("accelerate")
TEXTS = {**flux_inputs(), "side": 16}
STEPS = 4


def offload(pipe: Any) -> Any:
    """As `pipe.enable_model_cpu_offload()`, for the denoiser. Returns what takes it back."""
    return accelerate.cpu_offload_with_hook(pipe.transformer, "cpu")[1].remove


@pytest.mark.sampled(2)
@pytest.mark.parametrize("first", ["offloaded", "enabled"])
def test_a_denoiser_that_is_moved_as_a_whole_is_cached_before_and_after(first, enabled):
    pipe = flux()
    exact = draw(pipe, STEPS, **TEXTS)
    undo = offload(pipe) if first == "offloaded" else None
    model = enabled(pipe, "stack", full_every=2)
    pictures, counts = [draw(pipe, STEPS, **TEXTS)], [steps_of(model)]
    undo = undo or offload(pipe)
    pictures.append(draw(pipe, STEPS, **TEXTS))
    counts.append(steps_of(model))
    undo()
    pictures.append(draw(pipe, STEPS, **TEXTS))
    assert counts[0] == (2, 2) and counts[1] == (4, 4)
    assert own_warnings(moeca_compile.report(model)) == []
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)
    assert 0 < (pictures[0] - exact).norm() < 0.05 * exact.norm()
    moeca_compile.disable(pipe)
    assert torch.equal(draw(pipe, STEPS, **TEXTS), exact)


def test_blocks_that_are_moved_one_by_one_run_uncached_with_a_warning_that_names_the_hook(enabled):
    pipe = flux()
    exact = draw(pipe, STEPS, **TEXTS)
    where = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    diffusers.hooks.apply_group_offloading(
        pipe.transformer, **where, offload_type="block_level", num_blocks_per_group=1
    )
    model = enabled(pipe, "stack", full_every=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.testing.assert_close(draw(pipe, STEPS, **TEXTS), exact, atol=2e-6, rtol=1e-6)
    (warning,) = [str(each.message) for each in told if "moeca:" in str(each.message)]
    assert "group_offloading.py" in warning and "the graph breaks here" in warning
    assert steps_of(model)[1] == 0
