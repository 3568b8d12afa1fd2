"""Layers in which experts take tokens: one graph, one `moeca::expert_pairs` a layer, eager's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from moeca_compile import capture
from tests.capture.layers import stack, tokens
from tests.capture.loop_layers import DYNAMIC, THRESHOLDS, FixedInTheLoop, OfTheBatch
from tests.capture.pair_layers import OVER_THE_BATCH, PER_SAMPLE
from tests.harness import RecordingBackend, nodes_of
from tests.references import run_with_markers

PAIRS = torch.ops.moeca.expert_pairs


def captured_pairs(model: nn.Module, *inputs: torch.Tensor, layers: int = 1, **tolerance: float) -> list[fx.Node]:
    """The markers of the one graph, whose meaning is what eager returns."""
    backend = RecordingBackend(run=lambda gm: lambda *args: run_with_markers(gm, args))
    with torch.no_grad():
        want = model(*inputs)
        got = torch.compile(model, backend=backend)(*inputs)
    assert capture.refusals() == ()
    assert len(backend.graphs) == 1
    markers = nodes_of(backend.graphs[0], PAIRS)
    assert len(markers) == layers
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, **tolerance)
    return markers


@pytest.mark.parametrize("layer", PER_SAMPLE)
def test_choice_within_a_sample(layer):
    (marker,) = captured_pairs(stack(layer()), tokens())
    assert marker.args[6:] == (2 * 4 * 4, False)


@pytest.mark.parametrize("layer", OVER_THE_BATCH)
def test_choice_over_the_batch(layer):
    (marker,) = captured_pairs(stack(layer()), tokens())
    assert marker.args[6:] == (4 * 8, True)


@pytest.mark.parametrize("layer", DYNAMIC)
def test_a_capacity_that_is_predicted(layer):
    (marker,) = captured_pairs(stack(layer()), tokens())
    assert marker.args[6:] == (0, True)


@pytest.mark.parametrize("layer", THRESHOLDS)
def test_a_threshold(layer):
    (marker,) = captured_pairs(stack(layer()), tokens())
    assert marker.args[6:] == (0, False)


def test_a_threshold_that_the_batch_makes():
    (marker,) = captured_pairs(stack(OfTheBatch()), tokens())
    assert marker.args[6:] == (0, True)


def test_a_top_k_of_fixed_size_in_the_loop():
    (marker,) = captured_pairs(stack(FixedInTheLoop()), tokens())
    assert marker.args[6:] == (5 * 8, True)
