"""Write rows where a mask says so: keys and values of tokens, recomputed branches, outputs by place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeca_compile.ops.triton.compaction import SortedBranches

_WIDEST = 1024
"""Most columns that a program processes at a time; wider rows take several iterations."""


@triton.jit
def token_kernel(
    keys: tl.tensor,
    values: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    chosen: tl.tensor,
    valid: tl.tensor,
    heads: tl.tensor,
    count: tl.tensor,
    key_width: tl.tensor,
    value_width: tl.tensor,
    keys_sample: tl.tensor,
    keys_token: tl.tensor,
    keys_head: tl.tensor,
    keys_column: tl.tensor,
    values_sample: tl.tensor,
    values_token: tl.tensor,
    values_head: tl.tensor,
    values_column: tl.tensor,
    key_sample: tl.tensor,
    key_head: tl.tensor,
    key_token: tl.tensor,
    key_column: tl.tensor,
    value_sample: tl.tensor,
    value_head: tl.tensor,
    value_token: tl.tensor,
    value_column: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program writes all heads of one chosen token: of its keys, or of its values."""
    sample, number = tl.program_id(0) // count, tl.program_id(0) % count
    if tl.load(valid + tl.program_id(0)) == 0:
        return
    token = tl.load(chosen + tl.program_id(0)).to(tl.int64)
    if tl.program_id(1) == 0:
        to = keys + sample.to(tl.int64) * keys_sample + token * keys_token
        source = key + sample.to(tl.int64) * key_sample + number * key_token
        _copy_heads(to, keys_head, keys_column, source, key_head, key_column, heads, key_width, BLOCK)
    else:
        to = values + sample.to(tl.int64) * values_sample + token * values_token
        source = value + sample.to(tl.int64) * value_sample + number * value_token
        _copy_heads(to, values_head, values_column, source, value_head, value_column, heads, value_width, BLOCK)


@triton.jit
def _copy_heads(
    to: tl.tensor,
    to_head: tl.tensor,
    to_column: tl.tensor,
    source: tl.tensor,
    source_head: tl.tensor,
    source_column: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    for start in range(0, heads * width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        h, c = at // width, at % width
        value = tl.load(source + h * source_head + c * source_column, mask=at < heads * width, other=0.0)
        tl.store(to + h * to_head + c * to_column, value.to(to.dtype.element_ty), mask=at < heads * width)


def write_tokens(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, chosen: Tensor, valid: Tensor) -> None:
    """Write the valid rows of `key` and `value` (B, H, C, d) at the tokens `chosen` (B, C) of caches (B, N, H, d)."""
    samples, heads, count, _ = key.shape
    sizes = key.shape[-1], value.shape[-1]
    if samples * heads * count * max(sizes) == 0:
        return
    token_kernel[(samples * count, 2)](
        keys,
        values,
        key,
        value,
        chosen.contiguous(),
        valid.contiguous().view(torch.uint8),
        heads,
        count,
        *sizes,
        *keys.stride(),
        *values.stride(),
        *key.stride(),
        *value.stride(),
        BLOCK=_block(heads * max(sizes)),
    )


@triton.jit
def output_kernel(
    fresh: tl.tensor,  # (M, D) by position
    order: tl.tensor,
    ends: tl.tensor,
    ring: tl.tuple,  # K tensors (rows, D)
    history: tl.tensor,  # by branch of the layer, or None where K is 1
    forecast: tl.tensor,  # (K, K), or None where K is 1
    rows: tl.tensor,  # (M,) row of the ring by place, -1 for none; None if it follows from `chosen`
    chosen: tl.tensor,  # (B * C,) tokens
    norms: tl.tensor,  # (M,) by place
    width: tl.tensor,
    experts: tl.tensor,
    k: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program writes the norm and the cached outputs of one recomputed branch.

    Slot r of the ring gets output + (slot r - forecast), so that a forecast at this step gives the output.
    """
    position = tl.program_id(0)
    if position >= tl.load(ends + experts - 1):
        return
    place = tl.load(order + position)
    if rows is None:
        token = place // k
        row = (token // count * tokens + tl.load(chosen + token).to(tl.int32)) * k + place % k
        branch = row
    else:
        row = tl.load(rows + place)
        branch = place
    row = row.to(tl.int64)
    end = tl.where(row < 0, 0, width)  # number of columns to cache: all or none
    weights = 0
    most = 0.0
    if SLOTS > 1:
        weights = tl.maximum(tl.load(history + branch) - 1, 0) * SLOTS
        for r in tl.static_range(SLOTS):
            most += tl.abs(tl.load(forecast + weights + r))
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(fresh + position.to(tl.int64) * width + at, mask=at < width, other=0.0).to(tl.float32)
        squares += value * value
        if SLOTS > 1:
            read = tl.zeros([BLOCK], tl.float32)
            for r in tl.static_range(SLOTS):
                factor = tl.load(forecast + weights + r)
                some = at < tl.where(factor == 0, 0, end)
                read += factor * tl.load(ring[r] + row * width + at, mask=some, other=0.0).to(tl.float32)
            for r in tl.static_range(SLOTS):
                # Where the forecast is this slot alone, the slot gets the output itself and is not read.
                alone = most == tl.abs(tl.load(forecast + weights + r))
                some = at < tl.where(alone, 0, end)
                old = tl.load(ring[r] + row * width + at, mask=some, other=0.0).to(tl.float32)
                moved = value + tl.where(some, old - read, 0.0)
                tl.store(ring[r] + row * width + at, moved.to(ring[r].dtype.element_ty), mask=at < end)
        else:
            tl.store(ring[0] + row * width + at, value.to(ring[0].dtype.element_ty), mask=at < end)
    tl.store(norms + place, tl.sqrt(tl.sum(squares, 0)))


def write_outputs(
    fresh: Tensor,
    branches: SortedBranches,
    ring: Sequence[Tensor],
    history: Tensor | None = None,
    forecast: Tensor | None = None,
    chosen: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Write recomputed branches into the ring, and return their norms.

    Args:
        fresh: (M, D) outputs by position.
        branches: the recomputed branches.
        ring: K tensors, each (B, N, k, D) with `chosen`, (rows, D) with `rows`; written in place.
        history: (B, N, k) or (T, E), how many of the ring's outputs are a branch's own; None where K is 1.
        forecast: (K, K) the weights of the slots, by history; None where K is 1.
        chosen: (B, C) tokens of the branches (fixed k).
        rows: (M,) int32 by place, row in the pools or -1 for branches that are not cached (variable k).

    Returns:
        (M,) float32 norms by place, 0 where nothing was recomputed.
    """
    norms = torch.zeros(branches.capacity, dtype=torch.float32, device=fresh.device)
    if fresh.numel() == 0:
        return norms
    width = fresh.shape[1]
    count, tokens = (chosen.shape[1], ring[0].shape[1]) if chosen is not None else (1, 1)
    output_kernel[(branches.capacity,)](
        fresh,
        branches.order,
        branches.ends,
        tuple(slot.view(-1, width) for slot in ring),
        None if history is None else history.contiguous(),
        None if forecast is None else forecast.contiguous(),
        rows,
        None if chosen is None else chosen.contiguous(),
        norms,
        width,
        branches.experts,
        branches.k,
        count,
        tokens,
        SLOTS=len(ring),
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
        tl.store(out + place * width + at, value.to(out.dtype.element_ty), mask=at < width)


def by_place(values: Tensor, branches: SortedBranches, into: Tensor | None = None) -> Tensor:
    """Reorder rows (M, D) from positions to places, into a tensor if it is given. Rows that do not run stay as is."""
    out = torch.empty_like(values, memory_format=torch.contiguous_format) if into is None else into
    if values.numel():
        width = values.shape[1]
        place_kernel[(branches.capacity,)](
            values.contiguous(), branches.order, branches.ends, out, width, branches.experts, BLOCK=_block(width)
        )
    return out


def _block(width: int) -> int:
    return min(_WIDEST, triton.next_power_of_2(width))
