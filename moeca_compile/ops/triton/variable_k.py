"""`variable_k_outputs` and `refresh_variable_k` by kernels (ops.variable_k has their contract).

Only the data say how many branches there are, so the buffers between the kernels have room for all T * E of them;
kernels stop at the branches that there are, and the rest costs memory: T * E * (hidden + 2 * width) elements, given
back when the op ends. Places in the pool are found with plain ops of static shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeca_compile.ops import variable_k as reference
from moeca_compile.ops.triton.body_plan import kernel_plan
from moeca_compile.ops.triton.body_run import run_body
from moeca_compile.ops.triton.combine import combine_variable_k
from moeca_compile.ops.triton.compaction import SortedBranches, sort_by_expert
from moeca_compile.ops.triton.fallback import or_by_aten
from moeca_compile.ops.triton.rows import write_outputs


@or_by_aten(reference.variable_k_outputs)
def variable_k_outputs(
    rows: list[Tensor], routed: Tensor, weight: Tensor, parameters: list[Tensor], body: str, width: int, slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `ops.variable_k.variable_k_outputs`."""
    branches, fresh = _run(rows, routed, parameters, body)
    number = routed.flatten().cumsum(0).view(routed.shape)
    place = torch.where(routed & (number <= slots), number, 0).to(torch.int32)
    pool = fresh.new_zeros(slots, width)
    norms = write_outputs(fresh, branches, pool, slots=place.flatten() - 1)
    norms = torch.where(place > 0, norms.view(routed.shape), 0.0)
    return combine_variable_k(fresh, branches.position, routed, weight), pool, place, norms


@or_by_aten(reference.refresh_variable_k)
def refresh_variable_k(
    pool: Tensor,
    slope: Tensor | None,
    rows: list[Tensor],
    place: Tensor,
    routed: Tensor,
    mask: Tensor,
    weight: Tensor,
    ratio: Tensor,
    parameters: list[Tensor],
    body: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.variable_k.refresh_variable_k`."""
    branches, fresh = _run(rows, mask, parameters, body)
    had_row = place > 0
    place = with_places(place, routed, mask & ~had_row, len(pool))
    norms = write_outputs(fresh, branches, pool, slope, ratio, had_row, slots=place.flatten() - 1)
    out = combine_variable_k(fresh, branches.position, routed, weight, pool, slope, place, ratio)
    return out, place, norms.view(routed.shape)


def _run(rows: list[Tensor], mask: Tensor, parameters: list[Tensor], body: str) -> tuple[SortedBranches, Tensor]:
    """The branches of `mask` sorted by expert, and their outputs (T * E, width) by position."""
    experts = mask.shape[1]
    plan = kernel_plan(body, rows, parameters, experts)
    branches = sort_by_expert(None, mask, experts, experts)
    return branches, run_body(plan, rows, branches, parameters, scatter=False).to(rows[0].dtype)


def with_places(place: Tensor, routed: Tensor, new: Tensor, slots: int) -> Tensor:
    """The places when the branches of `new` take, in order, the rows that no routed one holds.

    Args:
        place: (T, E) int32, places counted from 1; routed, new: (T, E) bool.
        slots: rows of the pool.

    Who held a row that is taken loses it. All by sizes that are known beforehand: row 0, and branch T * E, stand for
    none, and take what is written for nobody.
    """
    branches, device = place.numel(), place.device
    rows = torch.arange(slots + 1, device=device)
    holder = torch.full((slots + 1,), branches, device=device).scatter_(
        0, place.flatten().long(), torch.arange(branches, device=device)
    )
    is_routed = torch.cat([routed.flatten(), routed.new_zeros(1)])
    free = ~is_routed.index_select(0, holder) & (rows > 0)
    free_number, new_number = free.cumsum(0), new.flatten().cumsum(0)
    taken = free & (free_number <= new.sum())
    row_of = torch.zeros_like(rows).scatter_(0, torch.where(free, free_number, 0), rows * free)
    lost = torch.zeros_like(is_routed).scatter_(0, torch.where(taken, holder, branches), True)[:-1].view(place.shape)
    # A branch past the last free row finds 0: no more than `slots` can be free.
    mine = torch.where(new_number <= free.sum(), row_of.take(new_number.clamp_max(slots)), 0).view(place.shape)
    return torch.where(new, mine, torch.where(lost, 0, place)).to(place.dtype)
