"""Sort the branches that run by expert, without the host: counts and offsets stay on the device.

The *place* of a branch is its flat index in (rows, k), so its row is place // k. Its *position* is its index in
sorted order. All buffers have one entry for each place, whatever the mask, so shapes are static; kernels stop at
`ends`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 2048
"""Places that a program reads at a time: 16 a thread in a block of 128. With more, the scan spills registers."""


@dataclass(frozen=True)
class SortedBranches:
    """The branches of a mask, sorted by expert, then by place.

    Attributes:
        order: (M,) int32, the place at each position; 0 at positions past the last branch.
        position: (M,) int32, the position of each place; -1 where the mask is false.
        ends: (E,) int32, where each expert's positions end; the last is the number of branches that run.
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
        """(M,) int64, the row of each position; that of place 0 past the last branch."""
        return self.order.long() // self.k

    def expert(self) -> Tensor:
        """(M,) int64, the expert of each position; the last expert past the last branch."""
        positions = torch.arange(self.capacity, device=self.order.device, dtype=torch.int32)
        return torch.searchsorted(self.ends, positions, right=True).clamp_max(self.experts - 1)


@triton.jit
def sort_kernel(
    index: tl.tensor,  # (M,) expert ids; None if a place's slot is its expert
    mask: tl.tensor,  # (M,) bool; None if all places run
    order: tl.tensor,
    position: tl.tensor,
    ends: tl.tensor,
    places: tl.tensor,
    experts: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """A counting sort: program e finds the positions of the branches of expert e.

    A first pass over all ids counts the branches of earlier experts and its own, a second one assigns positions to
    its own. It is stable and needs no atomics. The ids stay in the L2 cache between passes.
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
        if expert == 0:  # one program fills the entries without a branch
            tl.store(position + at, -1, mask=(ids >= experts) & (at < places))
            tl.store(order + at, 0, mask=(at >= total) & (at < places))


@triton.jit
def _expert_of(index: tl.tensor, mask: tl.tensor, at: tl.tensor, places: tl.tensor, experts: tl.tensor) -> tl.tensor:
    """Expert ids of the places `at`; `experts` for those that do not run."""
    inside = at < places
    ids = at % experts if index is None else tl.load(index + at, mask=inside, other=0).to(tl.int32)
    runs = inside if mask is None else tl.load(mask + at, mask=inside, other=0).to(tl.int1) & inside
    return tl.where(runs, ids, experts)


def sort_by_expert(index: Tensor | None, mask: Tensor | None, experts: int, k: int) -> SortedBranches:
    """Sort the places of `mask` by their experts.

    Args:
        index: (..., k) expert ids of any integer dtype; None if each slot is an expert (k = E).
        mask: (..., k) bool, which places run; None for all. Either `index` or `mask` must be given.
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
