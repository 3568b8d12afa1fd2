"""What the tests of capture by running share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moeca_compile import capture
from tests.capture.layers import MoE, tokens
from tests.harness import RecordingBackend, nodes_of
from tests.references import run_with_markers

FIXED, VARIABLE = torch.ops.moeca.experts_fixed_k, torch.ops.moeca.experts_variable_k


def compiled(model: nn.Module) -> tuple[nn.Module, RecordingBackend]:
    backend = RecordingBackend(run=lambda gm: lambda *args: run_with_markers(gm, args))
    return torch.compile(model, backend=backend), backend


def routings(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random rows; far apart; all the same, so that most experts are idle; the same but for one."""
    x = tokens(dtype)
    same = x[:1, :1].expand_as(x).contiguous()
    last = same.clone()
    last[-1, -1] *= -1
    return [x, 5 * x, same, last]


def assert_captured(model: nn.Module, *more: Tensor, marker=FIXED, dtype=torch.float32, **tolerance: float) -> None:
    found, backend = compiled(model)
    with torch.no_grad():
        for x in routings(dtype):
            torch.testing.assert_close(found(x, *more), model(x, *more), **tolerance)
    assert capture.refusals() == ()
    (graph,) = backend.graphs
    assert len(nodes_of(graph, marker)) == sum(isinstance(each, MoE) for each in model.modules())


def refusal_of(model: nn.Module, *more: Tensor) -> str:
    """Why a layer stays as it is; its numbers are the original's."""
    found, backend = compiled(model)
    with torch.no_grad(), pytest.warns(capture.CaptureWarning) as caught:
        for x in routings():
            torch.testing.assert_close(found(x, *more), model(x, *more))
    assert not any(nodes_of(graph, marker) for graph in backend.graphs for marker in (FIXED, VARIABLE))
    assert len([each for each in caught if each.category is capture.CaptureWarning]) == 1
    (refusal,) = capture.refusals()
    return refusal.reason
