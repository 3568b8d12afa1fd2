"""Block sizes of the grouped product: a small static table, so that no step spends time on autotuning."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Blocks:
    """One program computes `rows` x `columns` outputs in slices of `depth` inputs, with `stages` buffered slices."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def narrowed(self) -> Blocks:
        """For weights with unaligned rows, which are loaded through registers: these have room for no more."""
        return replace(self, rows=min(self.rows, 32), columns=min(self.columns, 64), depth=16, stages=2)


_HALF = (
    (16, Blocks(16, 64, 128, 4, 3)),
    (64, Blocks(32, 64, 64, 4, 4)),
    (256, Blocks(64, 64, 64, 4, 3)),
    (None, Blocks(128, 64, 64, 8, 3)),
)
_FULL = (
    (16, Blocks(16, 32, 64, 4, 3)),
    (64, Blocks(32, 32, 32, 4, 3)),
    (None, Blocks(64, 64, 32, 8, 3)),
)
"""(largest number of rows an expert, blocks). With few rows, reading the weights takes the time: many programs with
small, deep blocks keep many loads in flight. With many rows, multiplying takes the time: large blocks use each loaded
value often. A gated product has two accumulators and two weights, so blocks have at most 64 columns."""

_MANY = 512
"""Rows an expert above which there are programs enough for blocks of 128 columns."""

_WIDE = Blocks(128, 128, 64, 8, 3)
"""For a product with one weight: as many accumulators as a gated one has. Of each byte that comes from the L2 cache
it makes 64 operations, where 64 columns make 43."""


def blocks_for(dtype: torch.dtype, places: int, experts: int, gated: bool = True, columns: int = 64) -> Blocks:
    """The table's entry if all places run and are spread evenly over the experts."""
    share = places // experts
    if dtype != torch.float32 and share > _MANY and not gated and columns > 64:
        return _WIDE
    table = _FULL if dtype == torch.float32 else _HALF
    return next(blocks for most, blocks in table if most is None or share <= most)


def every_entry(dtype: torch.dtype, gated: bool = True) -> tuple[Blocks, ...]:
    """All block sizes that `blocks_for` can give for a dtype."""
    entries = tuple(blocks for _, blocks in (_FULL if dtype == torch.float32 else _HALF))
    return entries if gated or dtype == torch.float32 else (*entries, _WIDE)
