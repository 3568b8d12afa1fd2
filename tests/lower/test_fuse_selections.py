"""Top-k and scatter of routers as ops that Inductor fuses: values by hand, what is rewritten, kernels."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_compile.lower import fuse_selections as fuse
from moeca_compile.ops import selection
from tests.lower import rewrites
from tests.lower.rewrites import traced
from tests.runtime.fake_cuda import CUDA

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 6e-8, -6e-8, 3.0, 2.5)
"""With many ties; 6e-8 has no normal float16."""


def sorted_by_hand(row: list[float]) -> list[int]:
    """Columns by value: NaN first, ties by column."""
    return sorted(range(len(row)), key=lambda i: (not math.isnan(row[i]), 0 if math.isnan(row[i]) else -row[i], i))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 3).flatmap(
        lambda n: st.lists(st.lists(st.sampled_from(SPECIAL), min_size=4 * n, max_size=4 * n), min_size=1, max_size=4)
    ),
    k=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
)
def test_the_greatest_of_each_row_by_hand(rows, k, dtype):
    x = torch.tensor(rows, dtype=torch.float64).to(dtype)
    k = min(k, x.shape[-1])
    values, index = selection.topk(x, k)
    assert values.dtype == dtype and index.dtype == torch.int64
    assert index.tolist() == [sorted_by_hand(row)[:k] for row in x.tolist()]
    torch.testing.assert_close(values, x.gather(-1, index), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_rows_as_torch_has_them_with_any_leading_dims_and_strides(dtype):
    x = torch.randn(5, 16, 3).to(dtype).transpose(1, 2)[::2]
    x = x + 1e-3 * torch.arange(16).to(dtype)  # fewer ties, whose order torch leaves open
    values, _ = selection.topk(x, 4)
    assert torch.equal(values, x.topk(4).values)


@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 20)), k=st.integers(1, 8))
def test_marks_are_those_of_scatter(shape, k):
    base, index = torch.randn(shape), torch.randint(shape[-1], (*shape[:2], k))
    for dtype in (torch.float32, torch.bfloat16):
        found = selection.mark(base.to(dtype), index, 0.75)
        expected = base.to(dtype).scatter(-1, index, 0.75)
        assert found.dtype == dtype and torch.equal(found, expected)


# --- what is rewritten ----------------------------------------------------------------------------------------

rewritten = partial(rewrites.rewritten, fuse.fuse_selections)


def grouped(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The best two of 16 within the better half of 4 groups."""
    by_group = scores.unflatten(-1, (4, -1))
    goodness = by_group.topk(2, dim=-1).values.sum(-1)
    best = goodness.topk(2, dim=-1).indices
    allowed = torch.zeros_like(goodness).scatter(-1, best, 1.0)
    values, index = by_group.masked_fill(allowed.unsqueeze(-1) == 0, -math.inf).flatten(-2).topk(2, sorted=False)
    return values, index


def test_a_router_of_groups_keeps_no_topk_and_no_scatter_and_its_values():
    gm = traced(grouped, (64, 16))
    assert rewritten(gm) == 4
    targets = {node.target for node in gm.graph.nodes}
    assert not targets & {aten.topk.default, aten.scatter.value}
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    values = [node.meta["val"] for node in next(iter(reversed(gm.graph.nodes))).all_input_nodes]
    assert [(tuple(v.shape), v.dtype, v.device) for v in values] == [
        ((64, 2), torch.float32, CUDA),
        ((64, 2), torch.int64, CUDA),
    ]


@pytest.mark.parametrize("sorted_", [True, False])
def test_the_values_of_a_rewritten_router(monkeypatch, sorted_):
    """On a CPU, where the pass leaves the ops alone unless it is told that it is on a device."""

    def router(scores: Tensor) -> tuple[Tensor, Tensor]:
        values, index = grouped(scores)
        other = scores.topk(3, dim=1, largest=True, sorted=sorted_)
        return values, index, other.values, torch.zeros_like(scores).scatter(1, other.indices, 2)

    gm = traced(router, (64, 16), device=torch.device("cpu"))
    assert rewritten(gm) == 0
    monkeypatch.setattr(fuse, "_on_cuda_float", lambda node: True)
    assert rewritten(gm) == 6
    scores = torch.randn(64, 16)
    for found, expected in zip(gm(scores), router(scores), strict=True):
        assert torch.equal(found, expected) or torch.equal(found, expected.sort(-1, descending=True).values)


NEAR_MISSES = {
    "more rounds than few": lambda x: x.topk(9).indices,
    "another dim": lambda x: x.topk(2, dim=0).indices,
    "the least": lambda x: x.topk(2, largest=False).indices,
    "too wide": lambda x: torch.cat([x] * 9, -1).topk(2).indices,
    "integers": lambda x: x.long().topk(2).indices,
    "marks in another dim": lambda x: x.scatter(0, x.long(), 1.0),
    "marks in some of the rows": lambda x: x.scatter(-1, x[:8, :2].long(), 1.0),
    "values of a tensor": lambda x: x.scatter(-1, x.long()[:, :2], x),
    "many marks": lambda x: x.scatter(-1, x.long(), 1.0),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_stays_as_it_is(name):
    gm = traced(NEAR_MISSES[name], (16, 32))
    before = [node.target for node in gm.graph.nodes]
    assert rewritten(gm) == 0
    assert [node.target for node in gm.graph.nodes] == before
