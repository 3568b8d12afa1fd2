"""Operands of which only shape, dtype and device are read are dropped; the values stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeca_compile.passes.normalize.drop_unread_operands import drop_unread_operands
from moeca_compile.passes.runner import run_passes
from tests.harness import exported, ops, placeholders

X = torch.randn(2, 7, 6)
OTHER = torch.randn(2, 3, 7, 2, dtype=torch.float64)


def written_into(x: Tensor, other: Tensor) -> Tensor:
    kept = torch.empty_like(other)
    kept.copy_(x[0, 0, 0])
    return kept


REWRITTEN = {
    "type_as": (lambda x, y: x.type_as(y), {"to": 1}),
    "type_as of the same dtype": (lambda x, y: x.type_as(y.float().exp()), {}),
    "new_zeros": (lambda x, y: y.new_zeros(2, 7, 6) + x, {"full": 1, "add": 1}),
    "new_ones of another dtype": (lambda x, y: y.new_ones(3, dtype=torch.int32), {"full": 1}),
    "new_full": (lambda x, y: y.new_full((3, 2), 0.5), {"full": 1}),
    "new_zeros of the same shape": (lambda x, y: x.exp().new_zeros(x.shape), {"exp": 1, "full_like": 1}),
    "fill_": (lambda x, y: (x * 2).fill_(3), {"mul": 1, "full_like": 1}),
    "copy_": (written_into, {"select": 3, "_to_copy": 1, "expand": 1}),
    "copy_ of the same shape": (lambda x, y: (y * 2)[:, 0].clone().copy_(x[..., :2]), {"slice": 1, "_to_copy": 1}),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten(name):
    function, expected = REWRITTEN[name]
    gm = exported(function, X, OTHER)
    (result,) = run_passes(gm.graph, [drop_unread_operands])
    assert result.matches == 1
    gm.recompile()
    assert ops(gm) == expected
    (value,), wanted = gm(X, OTHER), function(X, OTHER)
    assert value.dtype == wanted.dtype and value.device == wanted.device and torch.equal(value, wanted)
    assert list(placeholders(gm)[1].users) == []


STAY = {
    "to a dtype": lambda x, y: x.to(y.dtype),
    "arithmetic with both": lambda x, y: x * y[:, 0, :, :1],
    "a masked fill": lambda x, y: x.masked_fill(y[:, 0, :, :1] > 0, 1.0),
    "random numbers of a shape": lambda x, y: torch.rand_like(x),
    "a fill by a tensor": lambda x, y: (x * 2).fill_(y[0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", STAY)
def test_other_operands_stay(name):
    gm = exported(STAY[name], X, OTHER)
    before = ops(gm)
    assert drop_unread_operands(gm.graph) == 0
    assert ops(gm) == before
