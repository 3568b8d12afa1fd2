"""Weighted sums over a token's branches, in one pass over what is cached of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDEST = 512
"""Columns of a program; wider rows are taken by several."""


@triton.jit
def fixed_k_kernel(
    cache: tl.tensor,  # (T, k, D)
    slope: tl.tensor,  # the same, or None
    weight: tl.tensor,  # (T, k)
    ratio: tl.tensor,
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
    forecast = tl.load(ratio).to(tl.float32) if slope is not None else 0.0
    for slot in range(0, k):
        branch = (token * k + slot) * width + at
        value = tl.load(cache + branch, mask=inside, other=0.0).to(tl.float32)
        if slope is not None:
            value += forecast * tl.load(slope + branch, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weight + token * k + slot).to(tl.float32) * value
    tl.store(out + token * width + at, total.to(out.dtype.element_ty), mask=inside)


def combine_fixed_k(cache: Tensor, slope: Tensor | None, ratio: Tensor, weight: Tensor) -> Tensor:
    """Sum over slots of weight * (cached output + ratio * slope) (paper, eq. 8).

    Args:
        cache, slope: (B, N, k, D), slope may be None.
        ratio: scalar.
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
        ratio,
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
    place: tl.tensor,  # (T, E) rows of the pool, counted from 1, or None
    position: tl.tensor,  # (T * E,) positions of what was computed now, -1 for the rest
    routed: tl.tensor,
    weight: tl.tensor,
    ratio: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    experts: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program sums one token's routed branches over BLOCK columns; what the pool holds comes from there."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros([BLOCK], tl.float32)
    forecast = tl.load(ratio).to(tl.float32) if slope is not None else 0.0
    for expert in range(0, experts):
        branch = token * experts + expert
        if tl.load(routed + branch) != 0:
            w = tl.load(weight + branch).to(tl.float32)
            source = tl.load(position + branch).to(tl.int64)
            if place is None:
                value = tl.load(fresh + source * width + at, mask=inside, other=0.0).to(tl.float32)
            else:
                row = tl.load(place + branch).to(tl.int64) - 1
                # All columns of the pool's row or none; of what was computed now or none.
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
    place: Tensor | None = None,
    ratio: Tensor | None = None,
) -> Tensor:
    """Sum of weight * output over each token's routed branches.

    Args:
        fresh: (M, D) outputs by position; position: (T * E,) that of each branch, -1 for none.
        routed, weight: (T, E).
        pool, slope: (slots, D), as written already; place: (T, E) int32 rows counted from 1. A branch with a row is
            read there, with `ratio` times its slope; without `place` all come from `fresh`.

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
        None if place is None else place.contiguous(),
        position,
        routed.contiguous().view(torch.uint8),
        weight.contiguous(),
        ratio,
        out,
        width,
        experts,
        BLOCK=block,
    )
    return out
