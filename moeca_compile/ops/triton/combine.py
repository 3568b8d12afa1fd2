"""Weighted sums over a token's branches, which read each slot of their ring once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS = (1024, 512, 256)
"""Columns of a program; wider rows are split over several programs."""

_COLUMNS_PER_WARP = 256
"""Eight a thread, so that 16 bits are loaded 16 bytes at a time."""


def _block(width: int) -> int:
    """The block that leaves the fewest columns idle, and of those the largest."""
    if width <= _BLOCKS[-1]:
        return triton.next_power_of_2(width)
    return min(_BLOCKS, key=lambda block: triton.cdiv(width, block) * block)


def _warps(block: int) -> int:
    return max(1, block // _COLUMNS_PER_WARP)


@triton.jit
def ring_value(
    ring: tl.tuple,
    history: tl.tensor,
    forecast: tl.tensor,
    branch: tl.tensor,
    place: tl.tensor,
    at: tl.tensor,
    end: tl.tensor,
    SLOTS: tl.constexpr,
) -> tl.tensor:
    """The values `place` of a branch, whose columns are `at`, those before `end`: the slots summed by their weights.

    A slot whose weight is 0 is not read.
    """
    if SLOTS > 1:
        weights = forecast + tl.maximum(tl.load(history + branch) - 1, 0) * SLOTS
    value = tl.zeros(at.shape, tl.float32)
    for r in tl.static_range(SLOTS):
        factor = tl.load(weights + r) if SLOTS > 1 else 1.0
        some = at < tl.where(factor == 0, 0, end)
        value += factor * tl.load(ring[r] + place, mask=some, other=0.0).to(tl.float32)
    return value


@triton.jit
def fixed_k_kernel(
    ring: tl.tuple,  # K tensors (T * k, D)
    weight: tl.tensor,  # (T, k)
    history: tl.tensor,  # (T, k), or None where K is 1
    forecast: tl.tensor,  # (K, K), or None where K is 1
    out: tl.tensor,  # (T, D)
    width: tl.tensor,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program sums one token's K branches over BLOCK columns.

    The loop is unrolled, so that the loads of all branches are under way together.
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for number in tl.static_range(K):
        branch = token * K + number
        value = ring_value(ring, history, forecast, branch, branch * width + at, at, width, SLOTS)
        total += tl.load(weight + branch).to(tl.float32) * value
    tl.store(out + token * width + at, total.to(out.dtype.element_ty), mask=at < width)


def combine_fixed_k(
    ring: Sequence[Tensor], weight: Tensor, history: Tensor | None = None, forecast: Tensor | None = None
) -> Tensor:
    """Sum of weight * value over a token's branches (paper, eq. 8).

    Args:
        ring: K tensors (B, N, k, D).
        weight: (B, N, k).
        history, forecast: as in `ops.fixed_k.refresh_fixed_k`.

    Returns:
        (B, N, D) in the dtype of the ring.
    """
    samples, tokens, k, width = ring[0].shape
    out = ring[0].new_empty(samples, tokens, width)
    if out.numel() == 0:
        return out
    block = _block(width)
    fixed_k_kernel[(samples * tokens, triton.cdiv(width, block))](
        tuple(slot.view(-1, width) for slot in ring),
        weight.contiguous(),
        None if history is None else history.contiguous(),
        None if forecast is None else forecast.contiguous(),
        out,
        width,
        K=k,
        SLOTS=len(ring),
        BLOCK=block,
        num_warps=_warps(block),
    )
    return out


@triton.jit
def variable_k_kernel(
    ring: tl.tuple,  # K pools (rows, D), or none
    fresh: tl.tensor,  # (M, D) by position
    pool_row: tl.tensor,  # (T, E) rows of the pools, counted from 1, or None
    position: tl.tensor,  # (T * E,) position in `fresh`, -1 for branches that were not computed now
    routed: tl.tensor,
    weight: tl.tensor,
    history: tl.tensor,  # (T, E), or None where K is 1
    forecast: tl.tensor,  # (K, K), or None where K is 1
    out: tl.tensor,
    width: tl.tensor,
    experts: tl.tensor,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program sums one token's routed branches over BLOCK columns; those in the pools are read there."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for expert in range(0, experts):
        branch = token * experts + expert
        if tl.load(routed + branch) != 0:
            w = tl.load(weight + branch).to(tl.float32)
            source = tl.load(position + branch).to(tl.int64)
            if pool_row is None:
                value = tl.load(fresh + source * width + at, mask=at < width, other=0.0).to(tl.float32)
            else:
                row = tl.load(pool_row + branch).to(tl.int64) - 1
                # Columns to read from the pools and from `fresh`: all of the one and none of the other.
                cached = tl.where(row < 0, 0, width)
                uncached = tl.where(row < 0, tl.where(source < 0, 0, width), 0)
                value = ring_value(ring, history, forecast, branch, row * width + at, at, cached, SLOTS)
                value += tl.load(fresh + source * width + at, mask=at < uncached, other=0.0).to(tl.float32)
            total += w * value
    tl.store(out + token * width + at, total.to(out.dtype.element_ty), mask=at < width)


def combine_variable_k(
    fresh: Tensor,
    position: Tensor,
    routed: Tensor,
    weight: Tensor,
    ring: Sequence[Tensor] = (),
    pool_row: Tensor | None = None,
    history: Tensor | None = None,
    forecast: Tensor | None = None,
) -> Tensor:
    """Sum of weight * value over each token's routed branches (paper, eq. 8).

    Args:
        fresh: (M, D) outputs by position.
        position: (T * E,) position of each place, -1 for none.
        routed, weight: (T, E).
        ring: K pools (rows, D), already updated. Branches without a row are read from `fresh`.
        pool_row: (T, E) int32 rows in the pools, counted from 1, or 0 for none; None to read all from `fresh`.
        history, forecast: as in `ops.variable_k.refresh_variable_k`.

    Returns:
        (T, D) in the dtype of `fresh`.
    """
    tokens, experts = routed.shape
    width = fresh.shape[1]
    out = fresh.new_empty(tokens, width)
    if out.numel() == 0:
        return out
    block = _block(width)
    variable_k_kernel[(tokens, triton.cdiv(width, block))](
        tuple(ring),
        fresh,
        None if pool_row is None else pool_row.contiguous(),
        position,
        routed.contiguous().view(torch.uint8),
        weight.contiguous(),
        None if history is None else history.contiguous(),
        None if forecast is None else forecast.contiguous(),
        out,
        width,
        experts,
        SLOTS=len(ring),
        BLOCK=block,
        num_warps=_warps(block),
    )
    return out
