"""What a model or a user does to tensors must not reach the caches, nor the other way round."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

import moeca_compile
from moeca_compile.lower.program import CompiledStep
from tests.models import SMALL, TinyDiTMoE, make_inputs, make_model

pytestmark = pytest.mark.usefixtures("traced_once")


class Counting(nn.Module):
    """A model that counts its calls in a buffer, and returns its stream beside its prediction."""

    def __init__(self, model: TinyDiTMoE) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.model(x, t, y)


def test_a_buffer_that_the_model_changes_is_changed_and_is_no_output():
    model = Counting(make_model()).eval()
    x, y = make_inputs(model.model)
    fast = torch.compile(model, backend="moeca", options={"recipe": "moeca", "lowering": "eager"})
    with torch.no_grad():
        first = fast(x, torch.full((2,), 1.0), y)
        fast(0.9 * x, torch.full((2,), 0.9), y)
        expected = model.model(x, torch.full((2,), 1.0), y)
    assert model.calls.item() == 2
    torch.testing.assert_close(first, expected)
    assert moeca_compile.report(fast).steps.keys() == {"full", "cache[8]"}


def test_two_models_through_one_compiled_function_do_not_share():
    one, other = make_model(SMALL), make_model(SMALL, seed=7)
    x, y = make_inputs(one)
    call = torch.compile(
        lambda model, x, t, y: model(x, t, y), backend="moeca", options={"recipe": "moeca", "lowering": "eager"}
    )
    with torch.no_grad():
        call(one, x, torch.full((2,), 1.0), y)
        call(one, x, torch.full((2,), 0.8), y)
        found = call(other, x, torch.full((2,), 0.5), y)
        torch.testing.assert_close(found, other(x, torch.full((2,), 0.5), y))


def test_a_half_written_step_is_not_used(monkeypatch):
    model = make_model(SMALL)
    x, y = make_inputs(model)
    fast = torch.compile(
        model, backend="moeca", options={"recipe": "moeca", "keys_values": "chosen", "lowering": "eager"}
    )
    with torch.no_grad():
        for time in (1.0, 0.9):
            fast(x, torch.full((2,), time), y)
        with monkeypatch.context() as patch:
            patch.setattr(CompiledStep, "__call__", _interrupt)
            with contextlib.suppress(KeyboardInterrupt):
                fast(x, torch.full((2,), 0.8), y)
        found = fast(x, torch.full((2,), 0.8), y)
        torch.testing.assert_close(found, model(x, torch.full((2,), 0.8), y))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
