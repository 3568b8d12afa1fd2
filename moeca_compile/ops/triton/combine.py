"""Weighted sums over a token's branches, which read cached outputs and slopes once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDEST = 512
"""Most columns of a program; wider rows are split over several programs."""


@triton.jit
def fixed_k_kernel(
    cache: tl.tensor,  # (T, k, D)
    slope: tl.tensor,  # (T, k, D) or None
    weight: tl.tensor,  # (T, k)
    distance: tl.tensor,
    out: tl.tensor,  # (T, D)
    width: tl.tensor,
    k: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program sums one token's k branches over BLOCK columns."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros([BLOCK], tl.float32)
    forecast = tl.load(distance).to(tl.float32) if slope is not None else 0.0
    for slot in range(0, k):
        branch = (token * k + slot) * width + at
        value = tl.load(cache + branch, mask=inside, other=0.0).to(tl.float32)
        if slope is not None:
            value += forecast * tl.load(slope + branch, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weight + token * k + slot).to(tl.float32) * value
    tl.store(out + token * width + at, total.to(out.dtype.element_ty), mask=inside)


def combine_fixed_k(cache: Tensor, slope: Tensor | None, distance: Tensor, weight: Tensor) -> Tensor:
    """Sum over slots of weight * (cached output + distance * slope) (paper, eq. 8).

    Args:
        cache, slope: (B, N, k, D); slope may be None.
        distance: scalar, the forecast distance; not read without a slope.
        weight: (B, N, k).

    Returns:
        (B, N, D) in the cache's dtype.
    """
    samples, tokens, k, width = cache.shape
    out = cache.new_empty(samples, tokens, width)
    if out.numel() == 0:
        return out
    block = min(_WIDEST, triton.next_power_of_2(width))
    fixed_k_kernel[(samples * tokens, triton.cdiv(width, block))](
        cache.view(-1, width),
        None if slope is None else slope.view(-1, width),
        weight.contiguous(),
        distance,
        out,
        width,
        k,
        BLOCK=block,
    )
    return out


@triton.jit
def variable_k_kernel(
    pool: tl.tensor,  # (slots, D) or None
    slope: tl.tensor,
    fresh: tl.tensor,  # (M, D) by position
    pool_row: tl.tensor,  # (T, E) rows of the pool, counted from 1, or None
    position: tl.tensor,  # (T * E,) position in `fresh`, -1 for branches that were not computed now
    routed: tl.tensor,
    weight: tl.tensor,
    distance: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    experts: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program sums one token's routed branches over BLOCK columns; those in the pool are read there."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros([BLOCK], tl.float32)
    forecast = tl.load(distance).to(tl.float32) if slope is not None else 0.0
    for expert in range(0, experts):
        branch = token * experts + expert
        if tl.load(routed + branch) != 0:
            w = tl.load(weight + branch).to(tl.float32)
            source = tl.load(position + branch).to(tl.int64)
            if pool_row is None:
                value = tl.load(fresh + source * width + at, mask=inside, other=0.0).to(tl.float32)
            else:
                row = tl.load(pool_row + branch).to(tl.int64) - 1
                # Columns to read from the pool and from `fresh`: all of the one and none of the other.
                cached = at < tl.where(row < 0, 0, width)
                uncached = at < tl.where(row < 0, tl.where(source < 0, 0, width), 0)
                value = tl.load(pool + row * width + at, mask=cached, other=0.0).to(tl.float32)
                if slope is not None:
                    value += forecast * tl.load(slope + row * width + at, mask=cached, other=0.0).to(tl.float32)
                value += tl.load(fresh + source * width + at, mask=uncached, other=0.0).to(tl.float32)
            total += w * value
    tl.store(out + token * width + at, total.to(out.dtype.element_ty), mask=inside)


def combine_variable_k(
    fresh: Tensor,
    position: Tensor,
    routed: Tensor,
    weight: Tensor,
    pool: Tensor | None = None,
    slope: Tensor | None = None,
    pool_row: Tensor | None = None,
    distance: Tensor | None = None,
) -> Tensor:
    """Sum of weight * (cached output + distance * slope) over each token's routed branches (paper, eq. 8).

    Args:
        fresh: (M, D) outputs by position.
        position: (T * E,) position of each place, -1 for none.
        routed, weight: (T, E).
        pool, slope: (slots, D), already updated. Branches without a row are read from `fresh`.
        pool_row: (T, E) int32 rows in the pool, counted from 1, or 0 for none; None to read all from `fresh`.
        distance: scalar, the forecast distance; not read without a slope.

    Returns:
        (T, D) in the dtype of `fresh`.
    """
    rows, experts = routed.shape
    width = fresh.shape[1]
    out = fresh.new_empty(rows, width)
    if out.numel() == 0:
        return out
    block = min(_WIDEST, triton.next_power_of_2(width))
    variable_k_kernel[(rows, triton.cdiv(width, block))](
        pool,
        slope,
        fresh,
        None if pool_row is None else pool_row.contiguous(),
        position,
        routed.contiguous().view(torch.uint8),
        weight.contiguous(),
        distance,
        out,
        width,
        experts,
        BLOCK=block,
    )
    return out
