"""A model is compiled once, however it is compiled: no forward becomes other code between its first calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.capture.layers import MoE, NumpyEnds, RunningStart, stack, tokens
from tests.harness import RecordingBackend
from tests.references import run_with_markers


class Keeps(MoE):
    """Only running it tells what it does."""

    def forward(self, x):
        self.seen = x.shape
        return super().forward(x)

    def route_to_experts(self, rows, index, weight):
        out = torch.zeros_like(rows)
        for e in sorted(set(index.flatten().tolist())):
            token, slot = torch.where(index == e)
            out[token] += self.experts[e](rows[token]) * weight[token, slot, None]
        return out


class Net(nn.Module):
    """Its own forward has blocks that are alike, a loop and a comparison, as layers have that may be run."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(stack(layer(), layer()))

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x) * 0.5 if number > 0 else block(x)
        return x.sort(-1).values if x.shape[-1] == 1 else x

    def guided(self, x):
        return self(x) + 1


def as_function(model: nn.Module, **how: Any) -> Callable[..., Any]:
    return torch.compile(lambda x: model(x), **how)


def in_place(model: nn.Module, **how: Any) -> Callable[..., Any]:
    model.compile(**how)
    return model


def bound(model: nn.Module, **how: Any) -> Callable[..., Any]:
    return torch.compile(model.guided, **how)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("compiled", [torch.compile, in_place, bound, as_function])
@pytest.mark.parametrize("layer", [Keeps, NumpyEnds, lambda: nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))])
def test_one_graph_over_three_calls(layer, compiled):
    class Root(Net):  # a class that no compilation has seen
        forward = Net.forward

    model = Root(layer).eval()
    before, x = Root.forward, tokens()
    backend = RecordingBackend(run=lambda gm: lambda *args: run_with_markers(gm, args))
    with torch.no_grad():
        expected = model.guided(x) if compiled is bound else model(x)
        fast = compiled(model, backend=backend)
        for _ in range(3):
            torch.testing.assert_close(fast(x), expected)
    assert len(backend.graphs) == 1
    assert Root.forward is before


def test_a_block_is_compiled_once_within_a_model_that_is_not():
    model, backend = Net(Keeps).eval(), RecordingBackend(run=lambda gm: lambda *a: run_with_markers(gm, a))
    x = tokens()
    with torch.no_grad():
        expected = model(x)
        model.blocks[0].compile(backend=backend)
        for _ in range(3):
            torch.testing.assert_close(model(x), expected)
    assert len(backend.graphs) == 1


def test_wrappers_have_code_of_their_own():
    """Dynamo keeps what it compiled by code, and gives up code that it has compiled eight times."""
    assert hasattr(NumpyEnds.moe_infer, "__wrapped__")
    assert NumpyEnds.moe_infer.__code__ is not RunningStart.dispatch.__code__
