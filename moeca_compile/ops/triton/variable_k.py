"""`variable_k_outputs` and `refresh_variable_k` on CUDA (the references are in ops.variable_k).

The number of branches depends on the data, so buffers between kernels have room for all T * E of them. Kernels stop
after the last branch, so the unused rest costs only memory: T * E * (hidden + 2 * width) elements while the op runs.
Rows in the pool are assigned by plain ops of static shape.
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
    rows: list[Tensor],
    routed: Tensor,
    weight: Tensor,
    pool_row: Tensor | None,
    parameters: list[Tensor],
    body: str,
    width: int,
    slots: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `ops.variable_k.variable_k_outputs`."""
    pool = rows[0].new_zeros(slots, width)
    out, pool_row, norms = _outputs_into(pool, rows, routed, weight, pool_row, parameters, body)
    return out, pool, pool_row, norms


@or_by_aten(reference.variable_k_outputs_into)
def variable_k_outputs_into(
    pool: Tensor,
    rows: list[Tensor],
    routed: Tensor,
    weight: Tensor,
    pool_row: Tensor | None,
    parameters: list[Tensor],
    body: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.variable_k.variable_k_outputs_into`."""
    return _outputs_into(pool, rows, routed, weight, pool_row, parameters, body)


def _outputs_into(
    pool: Tensor,
    rows: list[Tensor],
    routed: Tensor,
    weight: Tensor,
    pool_row: Tensor | None,
    parameters: list[Tensor],
    body: str,
) -> tuple[Tensor, Tensor, Tensor]:
    branches, fresh = _run(rows, routed, parameters, body)
    cached = routed & (routed.flatten().cumsum(0).view(routed.shape) <= len(pool))
    pool_row = _rows_of(cached, pool_row, len(pool))
    norms = write_outputs(fresh, branches, [pool], rows=pool_row.flatten() - 1)
    norms = torch.where(pool_row > 0, norms.view(routed.shape), 0.0)
    return combine_variable_k(fresh, branches.position, routed, weight), pool_row, norms


def _rows_of(cached: Tensor, before: Tensor | None, slots: int) -> Tensor:
    """Rows in the pool (T, E) for the branches `cached`: those that they had, or free ones in order."""
    if before is None:
        return torch.where(cached, cached.flatten().cumsum(0).view(cached.shape), 0).to(torch.int32)
    before = torch.where(cached, before, 0)
    return assign_rows(before, cached, cached & (before == 0), slots)


@or_by_aten(reference.refresh_variable_k)
def refresh_variable_k(
    ring: list[Tensor],
    rows: list[Tensor],
    pool_row: Tensor,
    routed: Tensor,
    mask: Tensor,
    weight: Tensor,
    history: Tensor | None,
    forecast: Tensor | None,
    parameters: list[Tensor],
    body: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.variable_k.refresh_variable_k`."""
    branches, fresh = _run(rows, mask, parameters, body)
    pool_row = assign_rows(pool_row, routed, mask & (pool_row == 0), len(ring[0]))
    norms = write_outputs(fresh, branches, ring, history, forecast, rows=pool_row.flatten() - 1)
    out = combine_variable_k(fresh, branches.position, routed, weight, ring, pool_row, history, forecast)
    return out, pool_row, norms.view(routed.shape)


def _run(rows: list[Tensor], mask: Tensor, parameters: list[Tensor], body: str) -> tuple[SortedBranches, Tensor]:
    """The branches of `mask` sorted by expert, and their outputs (T * E, width) by position."""
    experts = mask.shape[1]
    plan = kernel_plan(body, rows, parameters, experts)
    branches = sort_by_expert(None, mask, experts, experts)
    return branches, run_body(plan, rows, branches, parameters).to(rows[0].dtype)


def assign_rows(pool_row: Tensor, routed: Tensor, new: Tensor, slots: int) -> Tensor:
    """Give the branches of `new`, in order, the rows that no routed branch has. Previous branches lose them.

    Args:
        pool_row: (T, E) int32, rows in the pool counted from 1, or 0 for none.
        routed: (T, E) bool, which pairs are branches.
        new: (T, E) bool, branches that need a row.
        slots: number of rows of the pool.

    Returns:
        (T, E) rows as in `pool_row`.

    All shapes are static: row 0 and branch T * E stand for none, and absorb writes that have no target.
    """
    branches, device = pool_row.numel(), pool_row.device
    rows = torch.arange(slots + 1, device=device)
    holder = torch.full((slots + 1,), branches, device=device).scatter_(
        0, pool_row.flatten().long(), torch.arange(branches, device=device)
    )
    is_routed = torch.cat([routed.flatten(), routed.new_zeros(1)])
    free = ~is_routed.index_select(0, holder) & (rows > 0)
    free_number, new_number = free.cumsum(0), new.flatten().cumsum(0)
    taken = free & (free_number <= new.sum())
    row_of = torch.zeros_like(rows).scatter_(0, torch.where(free, free_number, 0), rows * free)
    lost = (
        torch.zeros_like(is_routed).scatter_(0, torch.where(taken, holder, branches), True)[:-1].view(pool_row.shape)
    )
    # Branches past the last free row get 0; at most `slots` rows can be free.
    mine = torch.where(new_number <= free.sum(), row_of.take(new_number.clamp_max(slots)), 0).view(pool_row.shape)
    return torch.where(new, mine, torch.where(lost, 0, pool_row)).to(pool_row.dtype)
