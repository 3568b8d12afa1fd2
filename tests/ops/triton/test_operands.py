"""Tables of addresses: built once, built anew when a tensor moves, given up when they are many."""

from __future__ import annotations

import pytest
import torch

from tests.ops.triton.cases import BODIES, DEVICE, random

operands = pytest.importorskip("moeca_compile.ops.triton.operands")
from moeca_compile.ops.triton import body_plan, body_run  # noqa: E402
from moeca_compile.ops.unsupported import UnsupportedError  # noqa: E402


def test_a_table_holds_each_experts_address():
    tensors = [random((4, 6)) for _ in range(3)]
    found = operands.operand(tensors)
    assert found.table.tolist() == [tensor.data_ptr() for tensor in tensors]
    assert (found.shape, found.strides) == ((4, 6), (6, 1))


def test_alignment_is_that_of_the_least_aligned():
    whole = torch.zeros(3, 64, device=DEVICE)
    assert operands.operand([whole[0], whole[1]]).aligned
    assert not operands.operand([whole[0, :32], whole[1, 1:33]]).aligned


@pytest.mark.parametrize("other", [torch.zeros(6, 4), torch.zeros(6, 4).t(), torch.zeros(4, 6).half()])
def test_experts_have_to_lie_alike(other):
    with pytest.raises(UnsupportedError, match="differ"):
        operands.operand([torch.zeros(4, 6), other])


def test_tables_are_built_once_for_parameters_and_each_time_for_what_is_computed_from_them(monkeypatch):
    built = []
    monkeypatch.setattr(body_run, "operand", lambda tensors: built.append(0) or operands.operand(tensors))
    body = BODIES["swiglu"]
    parameters = body.parameters(3, torch.float32)
    plan = body_plan.kernel_plan(body.key(torch.float32), [random((2, 6))], parameters, 3)
    for _ in range(3):
        body_run.weights_of(plan, parameters, 3)
    assert len(built) == 3  # one for each weight
    body_run.weights_of(plan, [parameters[0].clone(), *parameters[1:]], 3)
    assert len(built) == 6
    monkeypatch.setattr(body_run, "parameter_values", doubled)
    fresh = body.parameters(3, torch.float32)
    for _ in range(2):
        body_run.weights_of(plan, fresh, 3)
    assert len(built) == 12


def doubled(plan, parameters):
    """Values at addresses that are not the parameters'."""
    return {node: [2 * own[i] for own in parameters] for i, node in enumerate(plan.parameters)}


def test_tables_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(operands, "_MOST", 4)
    for number in range(9):
        operands.memoized(("a test", number), lambda: ((), True))
    assert len(operands._tables) == 4
    assert ("a test", 8) in operands._tables
