"""Block sizes of the grouped product: a small static table, so that no step ever waits for a measurement."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Blocks:
    """One program computes `rows` x `columns` outputs, `depth` products at a time, in `stages` buffers."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def narrowed(self) -> Blocks:
        """For weights whose rows begin anywhere: they come through registers, which hold no more than this."""
        return replace(self, rows=min(self.rows, 32), depth=16, stages=2)


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
"""(rows an expert at most, blocks). Few rows: weights are what is read, so small blocks in many programs and deep
ones in flight. Many rows: products are what counts, so large blocks that use each weight often. A gated product has
two accumulators and reads two weights, hence no more than 64 columns."""


def blocks_for(dtype: torch.dtype, places: int, experts: int) -> Blocks:
    """The table's entry for the rows that an expert gets if all places run and the experts share them evenly."""
    share = places // experts
    table = _FULL if dtype == torch.float32 else _HALF
    return next(blocks for most, blocks in table if most is None or share <= most)


def every_entry(dtype: torch.dtype) -> tuple[Blocks, ...]:
    """All block sizes that `blocks_for` can give for a dtype."""
    return tuple(blocks for _, blocks in (_FULL if dtype == torch.float32 else _HALF))
