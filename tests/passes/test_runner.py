"""What the normalizing passes write alike, besides views and attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moeca_compile.passes.runner import normalize
from tests.harness import exported, ops

X, G, Y = torch.randn(2, 5, 4), torch.randn(2, 1, 4), torch.randn(2, 5, 4)

REWRITTEN = {
    "dropout in eval mode": (lambda x, g, y: F.dropout(x, 0.1, False) + y, {"add": 1}),
    "dropout of nothing": (lambda x, g, y: F.dropout(x, 0.0, True) + y, {"add": 1}),
    "addcmul": (lambda x, g, y: torch.addcmul(x, g, y), {"add": 1, "mul": 1}),
    "a scaled addcmul": (lambda x, g, y: torch.addcmul(x, g, y, value=0.3), {"add": 1, "mul": 1}),
    "a linear of flat rows": (
        lambda x, g, y: F.linear(x.view(10, 4), y[0]).view(2, 5, 5),
        {"linear": 1, "reshape": 1, "select": 1},
    ),
    "a linear of flat rows that were heads": (
        lambda x, g, y: F.linear(x.view(2, 5, 2, 2).transpose(0, 1).reshape(10, 4), y[0]).view(5, 2, 5),
        {"linear": 1, "reshape": 2, "transpose": 1, "clone": 1, "select": 1},
    ),
    "addcmul in place": (lambda x, g, y: (x * 2).addcmul_(y, g), {"add": 1, "mul": 2}),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten(name):
    function, expected = REWRITTEN[name]
    gm = exported(function, X, G, Y)
    normalize(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert ops(gm) == expected
    torch.testing.assert_close(gm(X, G, Y)[0], function(X, G, Y))


def test_a_linear_whose_flat_rows_are_wanted_stays():
    gm = exported(lambda x, g, y: ((z := F.linear(x.view(10, 4), y[0])).view(2, 5, 5), z), X, G, Y)
    normalize(gm.graph)
    assert ops(gm) == {"linear": 1, "reshape": 2, "select": 1}


def test_live_dropout_stays():
    gm = exported(lambda x, g, y: F.dropout(x, 0.1, True), X, G, Y)
    before = ops(gm)
    normalize(gm.graph)
    assert ops(gm) == before
