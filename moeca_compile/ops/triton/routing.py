"""`choose_experts` on CUDA (the reference is in ops.routing): a router's choice in one launch.

A program has some tokens with all their experts in registers. It finds the greatest of a row by a maximum over
integers that order as (value, lower column first), so a round of top-k is one reduction and ties go to the lower id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_VALUES = 512
"""Values of a program: four a thread, as 64-bit keys eight registers. With more, compilation takes longer."""

_TAKEN: tl.constexpr = tl.constexpr(-(1 << 62))
"""Below the key of every value."""


@triton.jit
def choice_kernel(
    logits: tl.tensor,
    bias: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    fill: tl.tensor,
    eps: tl.tensor,
    scale: tl.tensor,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    SCORES: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BEST_OF: tl.constexpr,
    GATHERED: tl.constexpr,
    NORM: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP_SLOTS: tl.constexpr,
) -> None:
    """One program chooses for ROWS tokens.

    COLUMNS, SLOTS and GROUP_SLOTS are EXPERTS, K and GROUPS rounded up to powers of two.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    live, inside = row < rows, column < EXPERTS
    at = row.to(tl.int64)[:, None] * row_stride + column[None, :] * column_stride
    x = tl.load(logits + at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if SCORES == "softmax":
        x = _softmax(x, inside)
    elif SCORES == "sigmoid":
        x = tl.sigmoid(x)
    score = _rounded(x, DTYPE)
    value = score
    if bias is not None:
        value = _rounded(score + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :], DTYPE)
    keys = tl.where(inside[None, :], _keys(value, column[None, :]), _TAKEN)
    if GROUPS > 1:
        kept = _in_best_groups(keys, column, EXPERTS // GROUPS, GROUPS, KEPT, BEST_OF, DTYPE, ROWS, GROUP_SLOTS)
        outside = _keys(_rounded(tl.zeros([ROWS, COLUMNS], tl.float32) + fill, DTYPE), column[None, :])
        keys = tl.where(inside[None, :] & (kept == 0), outside, keys)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros([ROWS, SLOTS], tl.int64)
    found = tl.zeros([ROWS, SLOTS], tl.float32)
    for j in tl.static_range(K):
        best = tl.max(keys, 1)
        which = _column_of(best)
        keys = tl.where(keys == best[:, None], _TAKEN, keys)
        weight = _value_of(best)
        if GATHERED:
            weight = tl.sum(tl.where(column[None, :] == which[:, None], score, 0.0), 1)
        chosen = tl.where(slot[None, :] == j, which[:, None], chosen)
        found = tl.where(slot[None, :] == j, weight[:, None], found)
    if NORM == "sum":  # slots past K are 0
        total = _rounded(_rounded(tl.sum(found, 1), DTYPE) + eps, DTYPE)
        found = _rounded(tl.math.div_rn(found, tl.broadcast_to(total[:, None], [ROWS, SLOTS])), DTYPE)
    elif NORM == "softmax":
        found = _rounded(_softmax(found, slot < K), DTYPE)
    found = _rounded(found * scale, DTYPE)
    to = row.to(tl.int64)[:, None] * K + slot[None, :]
    wanted = live[:, None] & (slot < K)[None, :]
    tl.store(ids + to, chosen, mask=wanted)
    tl.store(weights + to, _rounded(found, weights.dtype.element_ty).to(weights.dtype.element_ty), mask=wanted)


@triton.jit
def _in_best_groups(
    keys: tl.tensor,
    column: tl.tensor,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BEST_OF: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_SLOTS: tl.constexpr,
) -> tl.tensor:
    """(ROWS, COLUMNS), 1 where the column is in one of the KEPT groups with the greatest sums of BEST_OF values."""
    number = tl.arange(0, GROUP_SLOTS)
    groups = tl.full([ROWS, GROUP_SLOTS], _TAKEN, tl.int64)
    for g in tl.static_range(GROUPS):
        own = tl.where((column // SIZE == g)[None, :], keys, _TAKEN)
        total = tl.zeros([ROWS], tl.float32)
        for _ in tl.static_range(BEST_OF):
            best = tl.max(own, 1)
            own = tl.where(own == best[:, None], _TAKEN, own)
            total += _value_of(best)
        key = _keys(_rounded(total, DTYPE), tl.full([ROWS], g, tl.int32))
        groups = tl.where(number[None, :] == g, key[:, None], groups)
    kept = tl.zeros(keys.shape, tl.int32)
    for _ in tl.static_range(KEPT):
        best = tl.max(groups, 1)
        groups = tl.where(groups == best[:, None], _TAKEN, groups)
        kept = tl.where((column // SIZE)[None, :] == _column_of(best)[:, None], 1, kept)
    return kept


@triton.jit
def _softmax(x: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Over the columns `inside`, in float32; 0 in the others."""
    x = tl.where(inside[None, :], x, float("-inf"))
    x = tl.exp(x - tl.max(x, 1)[:, None])
    return tl.math.div_rn(x, tl.broadcast_to(tl.sum(x, 1)[:, None], x.shape))


@triton.jit
def _keys(value: tl.tensor, column: tl.tensor) -> tl.tensor:
    """Integers in the order of the floats, then of the columns downwards. NaN is the greatest, -0.0 equals 0.0."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(value == 0, 0, tl.where(value != value, 0x7FFFFFFF, bits))
    return (bits.to(tl.int64) << 8) | (255 - column)  # so there are at most 256 columns


@triton.jit
def _value_of(key: tl.tensor) -> tl.tensor:
    bits = (key >> 8).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _column_of(key: tl.tensor) -> tl.tensor:
    return 255 - (key & 255)


@triton.jit
def _rounded(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """A float32 value as it is after a cast to DTYPE. bfloat16 is rounded by hand: the interpreter truncates."""
    if tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x != x, x, bits.to(tl.float32, bitcast=True))
    elif tl.float16 == DTYPE:
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def choose_experts(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    scores: str,
    groups: int,
    kept_groups: int,
    best_of: int,
    fill: float,
    gathered: bool,
    norm: str,
    eps: float,
    scale: float,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As `ops.routing.choose_experts`, for at most 256 experts; ties go to the lower id."""
    rows, experts = logits.shape
    ids = logits.new_empty(rows, k, dtype=torch.int64)
    weights = logits.new_empty(rows, k, dtype=weight_dtype)
    if rows == 0:
        return ids, weights
    columns = triton.next_power_of_2(experts)
    block = max(1, _VALUES // columns)
    choice_kernel[(triton.cdiv(rows, block),)](
        logits,
        None if bias is None else bias.contiguous(),
        ids,
        weights,
        rows,
        *logits.stride(),
        fill,
        eps,
        scale,
        EXPERTS=experts,
        K=k,
        SCORES=scores,
        GROUPS=groups,
        KEPT=kept_groups,
        BEST_OF=best_of,
        GATHERED=gathered,
        NORM=norm,
        DTYPE=_TYPES[dtype],
        ROWS=block,
        COLUMNS=columns,
        SLOTS=triton.next_power_of_2(k),
        GROUP_SLOTS=triton.next_power_of_2(groups),
    )
    return ids, weights
