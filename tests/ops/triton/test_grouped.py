"""The grouped product against one product an expert."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.triton.cases import DEVICE, DTYPES, assert_within, random

grouped = pytest.importorskip("moeca_compile.ops.triton.grouped")
from moeca_compile.ops.triton.blocks import blocks_for, every_entry  # noqa: E402
from moeca_compile.ops.triton.compaction import sort_by_expert  # noqa: E402
from moeca_compile.ops.triton.operands import operand  # noqa: E402

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

ROUNDINGS = 4
"""Of a product: the reference sums in another order, in float32, and rounds each of its ops; a kernel rounds once."""


def weight_of(tensors: list[Tensor], biases: list[Tensor] | None, transposed: bool) -> grouped.Weight:
    return grouped.Weight(operand(tensors), operand(biases) if biases else None, transposed)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    out = x.float() @ (weight.float() if transposed else weight.float().t())
    return out if bias is None else out + bias.float()


def check(tokens, k, experts, depth, columns, dtype, activation="none", gated=False, bias=False, transposed=False,
          gather=True, scatter=False, blocks=None, share=0.6, x=None):  # fmt: skip
    index = torch.randint(experts, (tokens, k), device=DEVICE)
    branches = sort_by_expert(index, torch.rand(tokens, k, device=DEVICE) < share, experts, k)
    x = random((tokens if gather else tokens * k, depth), dtype) if x is None else x
    shape = (depth, columns) if transposed else (columns, depth)
    weights = [[random(shape, dtype) / depth**0.5 for _ in range(experts)] for _ in range(1 + gated)]
    biases = [[random((columns,), dtype) for _ in range(experts)] if bias else None for _ in weights]
    layers = list(zip(weights, biases, strict=True))
    into = torch.empty(tokens * k, columns, dtype=dtype, device=DEVICE) if scatter else None
    found = grouped.grouped_product(
        x, branches, tuple(weight_of(w, b, transposed) for w, b in layers), activation, gather, into, blocks
    )
    assert found.shape == (tokens * k, columns) and found.dtype == dtype
    total = int(branches.ends[-1])
    rows = []
    for position, place in enumerate(branches.order[:total].tolist()):
        e, row = int(index.flatten()[place]), x[place // k if gather else position]
        values = [product(row, w[e], b[e] if b else None, transposed) for w, b in layers]
        value = ACTIVATIONS[activation](values[0])
        rows.append(value * values[1] if gated else value)
    where = branches.order[:total].long() if scatter else torch.arange(total, device=DEVICE)
    expected = torch.stack(rows) if rows else found.new_zeros(0, columns)
    assert_within(found[where], expected.to(dtype), ROUNDINGS)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 8), st.integers(1, 6), st.integers(1, 70), st.integers(1, 70),
    st.sampled_from(DTYPES), st.sampled_from(sorted(ACTIVATIONS)), st.booleans(), st.booleans(), st.booleans(),
    st.booleans(), st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_any_product(
    tokens, k, experts, depth, columns, dtype, activation, gated, bias, transposed, gather, scatter, seed
):
    torch.manual_seed(seed)
    check(tokens, k, experts, depth, columns, dtype, activation, gated, bias, transposed, gather, scatter)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_every_block_size(dtype, gated):
    torch.manual_seed(0)
    for blocks in every_entry(dtype, gated):
        check(70, 2, 3, 130, 70, dtype, "silu", gated, blocks=blocks)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_branch_and_all(share):
    torch.manual_seed(0)
    check(20, 2, 4, 16, 16, torch.float32, share=share)


def test_experts_without_rows():
    torch.manual_seed(0)
    check(2, 1, 6, 16, 16, torch.float32)


def test_rows_with_strides():
    torch.manual_seed(0)
    check(9, 2, 3, 12, 5, torch.float32, x=random((12, 9)).t())
    check(9, 2, 3, 12, 5, torch.float32, x=random((9, 24))[:, ::2])


def test_slices_of_packed_weights_are_read_where_they_are():
    torch.manual_seed(0)
    stacked = random((3, 12, 20))
    weights = [stacked[e, :, 4:10] for e in range(3)]
    x, index = random((7, 12)), torch.randint(3, (7, 1), device=DEVICE)
    into = torch.empty(7, 6, device=DEVICE)
    found = grouped.grouped_product(
        x, sort_by_expert(index, None, 3, 1), (weight_of(weights, None, True),), gather=True, into=into
    )
    assert_within(found, torch.stack([x[t] @ weights[int(index[t])] for t in range(7)]), ROUNDINGS)


def test_nothing_is_written_where_nothing_runs():
    mask = torch.tensor([[True, False], [False, False], [True, True]], device=DEVICE)
    branches = sort_by_expert(torch.zeros(3, 2, dtype=torch.int64, device=DEVICE), mask, 2, 2)
    weight = weight_of([torch.zeros(5, 4, device=DEVICE)] * 2, None, False)
    into = torch.full((6, 5), 7.0, device=DEVICE)
    out = grouped.grouped_product(torch.ones(3, 4, device=DEVICE), branches, (weight,), gather=True, into=into)
    assert (out == 7.0).all(-1).tolist() == (~mask).flatten().tolist()


def test_block_sizes_follow_the_rows_of_an_expert():
    sizes = [blocks_for(torch.bfloat16, 16 * share, 16).rows for share in (1, 16, 17, 64, 65, 256, 257, 10**6)]
    assert sizes == [16, 16, 32, 32, 64, 64, 128, 128]


def test_a_product_with_one_weight_and_many_rows_has_blocks_of_128_columns():
    def columns(share, gated=False, outputs=1024, dtype=torch.bfloat16):
        return blocks_for(dtype, 16 * share, 16, gated, outputs).columns

    assert [columns(share) for share in (512, 513)] == [64, 128]
    assert columns(10**6, gated=True) == columns(10**6, outputs=64) == columns(10**6, dtype=torch.float32) == 64
    assert all(
        blocks_for(torch.float16, 16 * share, 16, False, 1024) in every_entry(torch.float16, False)
        for share in (1, 600)
    )


@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_float32_is_multiplied_as_torch_is_set_to(setting, expected):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert grouped.precision(torch.float32) == expected
        assert grouped.precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_tf32_follows_the_older_switch_too():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert grouped.precision(torch.float32) == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
