"""Write rows where a mask says so: keys and values of tokens, recomputed branches, outputs by place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeca_compile.ops.triton.compaction import SortedBranches

_WIDEST = 1024
"""Most columns that a program processes at a time; wider rows take several iterations."""


@triton.jit
def token_kernel(
    cache: tl.tensor,
    fresh: tl.tensor,
    chosen: tl.tensor,
    valid: tl.tensor,
    width: tl.tensor,
    head: tl.tensor,
    count: tl.tensor,
    cache_sample: tl.tensor,
    cache_token: tl.tensor,
    cache_head: tl.tensor,
    cache_column: tl.tensor,
    fresh_sample: tl.tensor,
    fresh_head: tl.tensor,
    fresh_token: tl.tensor,
    fresh_column: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program writes all heads of one chosen token, `width` values in all."""
    sample, number = tl.program_id(0) // count, tl.program_id(0) % count
    if tl.load(valid + tl.program_id(0)) == 0:
        return
    token = tl.load(chosen + tl.program_id(0)).to(tl.int64)
    to = cache + sample.to(tl.int64) * cache_sample + token * cache_token
    source = fresh + sample.to(tl.int64) * fresh_sample + number * fresh_token
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        h, c = at // head, at % head
        value = tl.load(source + h * fresh_head + c * fresh_column, mask=at < width, other=0.0)
        tl.store(to + h * cache_head + c * cache_column, value.to(cache.dtype.element_ty), mask=at < width)


def write_tokens(cache: Tensor, fresh: Tensor, chosen: Tensor, valid: Tensor) -> None:
    """Write the valid rows of `fresh` (B, H, C, d) at the tokens `chosen` (B, C) of `cache` (B, N, H, d)."""
    samples, heads, count, head = fresh.shape
    if fresh.numel() == 0:
        return
    token_kernel[(samples * count,)](
        cache,
        fresh,
        chosen.contiguous(),
        valid.contiguous().view(torch.uint8),
        heads * head,
        head,
        count,
        *cache.stride(),
        *fresh.stride(),
        BLOCK=_block(heads * head),
    )


@triton.jit
def output_kernel(
    fresh: tl.tensor,  # (M, D) by position
    order: tl.tensor,
    ends: tl.tensor,
    cache: tl.tensor,  # (slots, D)
    slope: tl.tensor,  # (slots, D) or None
    distance: tl.tensor,
    slots: tl.tensor,  # (M,) slot by place, -1 for none; None if it follows from `chosen`
    chosen: tl.tensor,  # (B * C,) tokens
    matched: tl.tensor,  # (M,) by place
    norms: tl.tensor,  # (M,) by place
    width: tl.tensor,
    experts: tl.tensor,
    k: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program writes the norm, slope and cached output of one recomputed branch.

    The slope of an unmatched branch becomes 0. The cache gets output - distance * slope, so that a forecast at this
    step gives the output.
    """
    position = tl.program_id(0)
    if position >= tl.load(ends + experts - 1):
        return
    place = tl.load(order + position)
    if slots is None:
        row = place // k
        slot = (row // count * tokens + tl.load(chosen + row).to(tl.int32)) * k + place % k
    else:
        slot = tl.load(slots + place)
    slot = slot.to(tl.int64)
    end = tl.where(slot < 0, 0, width)  # number of columns to cache: all or none
    has_slope = tl.load(matched + place) if slope is not None else 1
    forecast = tl.load(distance).to(tl.float32) if slope is not None else 0.0
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(fresh + position.to(tl.int64) * width + at, mask=at < width, other=0.0).to(tl.float32)
        squares += value * value
        if slope is not None:
            keep = at < tl.where(has_slope == 0, 0, end)
            clear = at < tl.where(has_slope == 0, end, 0)
            value -= forecast * tl.load(slope + slot * width + at, mask=keep, other=0.0).to(tl.float32)
            tl.store(slope + slot * width + at, tl.zeros([BLOCK], slope.dtype.element_ty), mask=clear)
        tl.store(cache + slot * width + at, value.to(cache.dtype.element_ty), mask=at < end)
    tl.store(norms + place, tl.sqrt(tl.sum(squares, 0)))


def write_outputs(
    fresh: Tensor,
    branches: SortedBranches,
    cache: Tensor,
    slope: Tensor | None = None,
    distance: Tensor | None = None,
    matched: Tensor | None = None,
    chosen: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Write recomputed branches into the cache, update their slopes, and return their norms.

    Args:
        fresh: (M, D) outputs by position.
        branches: the recomputed branches.
        cache: (B, N, k, D) with `chosen`, (slots, D) with `slots`; written in place.
        slope: like the cache, written in place; None without a forecast, then `distance` and `matched` are not read.
        distance: scalar, the forecast distance.
        matched: (M,) bool by place, whether the branch is cached; if not, its slope becomes 0.
        chosen: (B, C) tokens of the rows (fixed k).
        slots: (M,) int32 by place, row in the pool or -1 for branches that are not cached (variable k).

    Returns:
        (M,) float32 norms by place, 0 where nothing was recomputed.
    """
    norms = torch.zeros(branches.capacity, dtype=torch.float32, device=fresh.device)
    if fresh.numel() == 0:
        return norms
    width = fresh.shape[1]
    count, tokens = (chosen.shape[1], cache.shape[1]) if chosen is not None else (1, 1)
    output_kernel[(branches.capacity,)](
        fresh,
        branches.order,
        branches.ends,
        cache.view(-1, width),
        None if slope is None else slope.view(-1, width),
        distance,
        slots,
        None if chosen is None else chosen.contiguous(),
        None if matched is None else matched.reshape(-1).view(torch.uint8),
        norms,
        width,
        branches.experts,
        branches.k,
        count,
        tokens,
        BLOCK=_block(width),
    )
    return norms


@triton.jit
def place_kernel(
    values: tl.tensor,
    order: tl.tensor,
    ends: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    experts: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program copies one row from its position to its place."""
    position = tl.program_id(0)
    if position >= tl.load(ends + experts - 1):
        return
    place = tl.load(order + position).to(tl.int64)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(values + position.to(tl.int64) * width + at, mask=at < width, other=0.0)
        tl.store(out + place * width + at, value, mask=at < width)


def by_place(values: Tensor, branches: SortedBranches) -> Tensor:
    """Reorder rows (M, D) from positions to places. Rows of places that do not run are undefined."""
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    if values.numel():
        width = values.shape[1]
        place_kernel[(branches.capacity,)](
            values.contiguous(), branches.order, branches.ends, out, width, branches.experts, BLOCK=_block(width)
        )
    return out


def _block(width: int) -> int:
    return min(_WIDEST, triton.next_power_of_2(width))
