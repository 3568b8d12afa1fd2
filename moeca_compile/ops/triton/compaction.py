"""Which branches run, sorted by expert: counts and offsets stay on the device.

A branch has a *place*, its flat number among all (row, slot) places; a place's row is place // k. The capacity is the
number of places, whatever the mask: buffers are static, and what runs over them stops at `ends`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 2048
"""Places read at a time: 16 a thread in a block of 128, the most before the scan spills registers."""


@dataclass(frozen=True)
class SortedBranches:
    """The branches of a mask, in order of their experts and, within one, of their places.

    Attributes:
        order: (M,) int32, the place at each position; 0 from the total on.
        position: (M,) int32, the position of each place; -1 where the mask is false.
        ends: (E,) int32, where each expert's positions end; the last is the total.
        k: places a row.
    """

    order: Tensor
    position: Tensor
    ends: Tensor
    k: int

    @property
    def capacity(self) -> int:
        return self.order.numel()

    @property
    def experts(self) -> int:
        return self.ends.numel()

    def rows(self) -> Tensor:
        """(M,) int64 row of each position; that of place 0 from the total on."""
        return self.order.long() // self.k

    def expert(self) -> Tensor:
        """(M,) int64 expert of each position; the last one from the total on."""
        positions = torch.arange(self.capacity, device=self.order.device, dtype=torch.int32)
        return torch.searchsorted(self.ends, positions, right=True).clamp_max(self.experts - 1)


@triton.jit
def sort_kernel(
    index: tl.tensor,  # (M,) expert ids, or None: an expert is a place's slot
    mask: tl.tensor,  # (M,) bool, or None: all
    order: tl.tensor,
    position: tl.tensor,
    ends: tl.tensor,
    places: tl.tensor,
    experts: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """A counting sort in which program e places the branches of expert e.

    It counts those of the experts before it and its own, and then gives its own their positions in a second read.
    Stable, without atomics: two reads of the ids by each expert, which stay in the L2 cache.
    """
    expert = tl.program_id(0)
    before = tl.zeros([CHUNK], tl.int32)
    within = tl.zeros([CHUNK], tl.int32)
    every = tl.zeros([CHUNK], tl.int32)
    for start in range(0, places, CHUNK):
        at = start + tl.arange(0, CHUNK)
        ids = _expert_of(index, mask, at, places, experts)
        before += (ids < expert).to(tl.int32)
        within += (ids == expert).to(tl.int32)
        every += (ids < experts).to(tl.int32)
    first = tl.sum(before, 0)
    total = tl.sum(every, 0)
    tl.store(ends + expert, first + tl.sum(within, 0))
    for start in range(0, places, CHUNK):
        at = start + tl.arange(0, CHUNK)
        ids = _expert_of(index, mask, at, places, experts)
        mine = ids == expert
        to = first + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order + to, at, mask=mine)
        tl.store(position + at, to, mask=mine)
        first += tl.sum(mine.to(tl.int32), 0)
        if expert == 0:  # one program fills in what belongs to no branch
            tl.store(position + at, -1, mask=(ids >= experts) & (at < places))
            tl.store(order + at, 0, mask=(at >= total) & (at < places))


@triton.jit
def _expert_of(index: tl.tensor, mask: tl.tensor, at: tl.tensor, places: tl.tensor, experts: tl.tensor) -> tl.tensor:
    """Expert ids of the places `at`; `experts`, which is none, for those that do not run."""
    inside = at < places
    ids = at % experts if index is None else tl.load(index + at, mask=inside, other=0).to(tl.int32)
    runs = inside if mask is None else tl.load(mask + at, mask=inside, other=0).to(tl.int1) & inside
    return tl.where(runs, ids, experts)


def sort_by_expert(index: Tensor | None, mask: Tensor | None, experts: int, k: int) -> SortedBranches:
    """Sort the places of `mask` by their experts.

    Args:
        index: expert ids, (..., k) of any integer dtype; None where the slots are the experts (k = E).
        mask: which places run, of the same shape; None for all. One of the two must be there.
        experts: number of experts E.
        k: places a row.
    """
    given = index if index is not None else mask
    assert given is not None
    places, device = given.numel(), given.device
    order, position = (torch.empty(places, dtype=torch.int32, device=device) for _ in range(2))
    ends = torch.empty(experts, dtype=torch.int32, device=device)
    flat_index = None if index is None else index.reshape(-1)
    flat_mask = None if mask is None else mask.reshape(-1).view(torch.uint8)
    sort_kernel[(experts,)](flat_index, flat_mask, order, position, ends, places, experts, CHUNK=_CHUNK, num_warps=8)
    return SortedBranches(order, position, ends, k)
