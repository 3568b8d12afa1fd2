"""A view of a view reads the first value."""

from __future__ import annotations

import torch

from moeca_compile.passes.normalize.collapse_views import collapse_views
from moeca_compile.passes.runner import run_passes
from tests.harness import exported, ops

X = torch.arange(24.0).view(2, 3, 4)


def collapsed(function, *inputs):
    """(the graph, views changed, ops before), after comparing its outputs with the function's."""
    gm = exported(function, *inputs)
    before = ops(gm)
    (result,) = run_passes(gm.graph, [collapse_views])
    gm.recompile()
    (found,) = gm(*inputs)
    assert torch.equal(found, function(*inputs))
    return gm, result.matches, before


def test_a_pair_becomes_one():
    gm, changed, before = collapsed(lambda x: x.view(24).view(6, 4) + 1, X)
    assert changed == 1
    assert before == {"view": 2, "add": 1}
    assert ops(gm) == {"reshape": 1, "add": 1}


def test_a_chain_becomes_one_and_a_fork_stays_right():
    def fork(x):
        flat = x.view(24)
        return flat.view(6, 4).view(4, 6) + flat.view(12, 2).view(4, 6) + flat.sum()

    gm, changed, before = collapsed(fork, X)
    assert changed == 4
    assert before["view"] == 5
    assert ops(gm) == {"view": 1, "reshape": 2, "add": 2, "sum": 1}


def test_a_view_that_minus_one_sized_keeps_its_size():
    gm, changed, _ = collapsed(lambda x: x.reshape(-1).reshape(-1, 2) * 2, X)
    assert changed == 1
    (view,) = [node for node in gm.graph.nodes if node.target is torch.ops.aten.reshape.default]
    assert view.args[1] == [12, 2]


def test_a_value_that_is_not_contiguous():
    """The first value may have strides that only a copy can be viewed from."""
    gm, changed, _ = collapsed(lambda x: x.transpose(0, 2).reshape(24).view(6, 4) + 1, X)
    assert ops(gm)["transpose"] == 1
    assert changed <= 1


def test_near_misses_stay():
    for function in (
        lambda x: x.view(24) + 1,
        lambda x: x.view(24).relu().view(6, 4),
        lambda x: x.view(6, 4).t().reshape(24),
    ):
        gm, changed, before = collapsed(function, X)
        assert changed == 0
        assert ops(gm) == before
