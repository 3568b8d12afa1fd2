"""Parts of splits are slices with equal values."""

from __future__ import annotations

import pytest
import torch

from moeca_compile.passes.normalize.split_to_slices import split_to_slices
from moeca_compile.passes.runner import run_passes
from tests.harness import exported, ops

X = torch.randn(2, 7, 6)

SPLITS = {
    "with sizes": (lambda x: x.split([4, 3], dim=1), 2),
    "in parts": (lambda x: x.split(3, dim=1), 3),
    "chunks": (lambda x: x.chunk(2, dim=-1), 2),
    "of the first dim": (lambda x: x.split([1, 1]), 2),
    "where one part is read": (lambda x: x.split([4, 3], dim=1)[1] * 2, 1),
}


@pytest.mark.parametrize("name", SPLITS)
def test_splits(name):
    function, parts = SPLITS[name]
    gm = exported(function, X)
    (result,) = run_passes(gm.graph, [split_to_slices])
    assert result.matches == parts
    gm.recompile()
    assert ops(gm)["slice"] == parts
    assert not any(op in ops(gm) for op in ("split", "split_with_sizes", "chunk", "getitem"))
    expected = function(X)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for found, value in zip(gm(X), expected, strict=True):
        assert torch.equal(found, value)


def test_other_outputs_stay():
    """The two of a top-k, the parts of an unbind."""
    gm = exported(lambda x: (*x.topk(2), x.unbind(1)[0]), X)
    before = ops(gm)
    assert split_to_slices(gm.graph) == 0
    assert ops(gm) == before
