"""Expert outputs where a token has any number of experts (expert choice, dynamic capacity).

    variable_k_outputs(rows, routed, weight, slots, ...) -> combined, pool, pool_row, norms

        pool[pool_row[t, e] - 1] = expert_e(rows[t])                       for the first `slots` with routed[t, e]
        combined[t] = sum_e routed[t, e] * weight[t, e] * expert_e(rows[t])

    refresh_variable_k(pool, slope, rows, pool_row, routed, mask, weight, distance, ...) -> combined, pool_row, norms

        pool[p] = expert_e(rows[t]) - distance * slope[p]          where mask[t, e], with p = pool_row[t, e] - 1
        combined[t] = sum_e routed[t, e] * weight[t, e] * (pool[p] + distance * slope[p])

The cached outputs of branches are rows of a pool. `pool_row` (T, E) has each branch's row, counted from 1; 0 means
that it is not cached. If the pool is full, further branches are computed but not cached.

As in `ops.fixed_k`, each op is a plain function of ATen ops, and the reference for its CUDA kernels. Only
`refresh_variable_k` writes to the pool. The *place* of a branch is its flat index in (T, E).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeca_compile.ops.fixed_k import expert_outputs

_library = torch.library.Library("moeca", "FRAGMENT")
_library.define(
    "variable_k_outputs(Tensor[] rows, Tensor routed, Tensor weight, Tensor[] parameters, str body, int width, "
    "int slots) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "refresh_variable_k(Tensor(a!) pool, Tensor(b!)? slope, Tensor[] rows, Tensor pool_row, Tensor routed, "
    "Tensor mask, Tensor weight, Tensor distance, Tensor[] parameters, str body) -> (Tensor, Tensor, Tensor)"
)


def variable_k_outputs(
    rows: list[Tensor], routed: Tensor, weight: Tensor, parameters: list[Tensor], body: str, width: int, slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run and combine all routed branches, and cache the first `slots` of them.

    Args:
        rows: inputs of the experts, each (T, ...).
        routed: (T, E) bool, which pairs are branches.
        weight: (T, E) their weights.
        parameters: expert-major, E * P tensors.
        body: key of the expert body (ops.bodies).
        width: width of an expert's output.
        slots: number of rows of the pool.

    Returns:
        (T, width) combined output; (slots, width) pool; (T, E) int32 rows in the pool, counted from 1, or 0 for none;
        (T, E) norms of the cached outputs, 0 elsewhere.
    """
    branches, fresh = _run(rows, routed, parameters, body, width)
    out = _add_up(fresh, branches, weight).to(fresh.dtype)
    count = min(slots, len(branches))
    pool = fresh.new_zeros(slots, width)
    pool[:count] = fresh[:count]
    pool_row, norms = torch.zeros_like(routed, dtype=torch.int32), torch.zeros_like(routed, dtype=torch.float32)
    pool_row.view(-1)[branches[:count]] = torch.arange(1, count + 1, dtype=torch.int32, device=pool_row.device)
    norms.view(-1)[branches[:count]] = fresh[:count].norm(dim=-1).to(torch.float32)
    return out, pool, pool_row, norms


def refresh_variable_k(
    pool: Tensor,
    slope: Tensor | None,
    rows: list[Tensor],
    pool_row: Tensor,
    routed: Tensor,
    mask: Tensor,
    weight: Tensor,
    distance: Tensor,
    parameters: list[Tensor],
    body: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute the branches of `mask` into the pool, then combine all routed ones (paper, eq. 8).

    A recomputed branch without a row takes one that no routed branch has, and its slope becomes 0.

    Args:
        pool: (slots, width) outputs of the branches, written in place.
        slope: (slots, width) change of each branch between full steps, written in place; None without a forecast.
        rows, weight, parameters, body: as in `variable_k_outputs`.
        pool_row: (T, E) int32 rows in the pool, counted from 1, or 0 for none.
        routed: (T, E) bool, which pairs are branches.
        mask: (T, E) bool, which branches to recompute.
        distance: scalar, the forecast distance (as in `ops.fixed_k`).

    Returns:
        (T, width) combined output; (T, E) int32 rows in the pool as they are now; (T, E) norms of the recomputed
        branches, 0 elsewhere.
    """
    branches, fresh = _run(rows, mask, parameters, body, pool.shape[1])
    norms = torch.zeros_like(routed, dtype=torch.float32)
    norms.view(-1)[branches] = fresh.norm(dim=-1).to(torch.float32)
    had_row = pool_row.view(-1)[branches] > 0
    pool_row = _assign_rows(pool_row, routed, branches[~had_row], len(pool))
    row = pool_row.view(-1)[branches].long() - 1
    cached = row >= 0
    values = fresh[cached]
    if slope is not None:
        slope.index_fill_(0, row[cached & ~had_row], 0.0)
        values = values - distance * slope[row[cached]]
    pool.index_copy_(0, row[cached], values.to(pool.dtype))
    out = _combined(pool, slope, pool_row, routed, weight, distance) + _add_up(
        fresh[~cached], branches[~cached], weight
    )
    return out.to(fresh.dtype), pool_row, norms


def _run(rows: list[Tensor], mask: Tensor, parameters: list[Tensor], body: str, width: int) -> tuple[Tensor, Tensor]:
    """The places (M,) of the branches of `mask`, in order, and their outputs (M, width)."""
    experts = mask.shape[1]
    branches = mask.flatten().nonzero().squeeze(1)
    order, values = expert_outputs(rows, branches % experts, branches, experts, parameters, experts, body)
    outputs = rows[0].new_empty(len(branches), width)
    return branches, outputs.index_copy_(0, order, values.to(outputs.dtype))


def _add_up(outputs: Tensor, branches: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight * output over each token's branches: (T, width) in float32 or float64."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    out = torch.zeros(len(weight), outputs.shape[1], dtype=dtype, device=outputs.device)
    weighted = outputs.to(dtype) * weight.flatten()[branches].to(dtype)[:, None]
    return out.index_add_(0, branches // weight.shape[1], weighted)


def _combined(
    pool: Tensor, slope: Tensor | None, pool_row: Tensor, routed: Tensor, weight: Tensor, distance: Tensor
) -> Tensor:
    """Sum of weight * (cached output + distance * slope) over each token's cached branches: (T, width)."""
    branches = (routed & (pool_row > 0)).flatten().nonzero().squeeze(1)
    row = pool_row.view(-1)[branches].long() - 1
    outputs = pool[row]
    if slope is not None:
        outputs = outputs + distance * slope[row]
    return _add_up(outputs, branches, weight)


def _assign_rows(pool_row: Tensor, routed: Tensor, branches: Tensor, slots: int) -> Tensor:
    """Give `branches`, in order, the rows that no routed branch has. Their previous branches lose them."""
    pool_row = pool_row.clone()
    flat = pool_row.view(-1)
    owner = torch.full((slots + 1,), -1, device=pool_row.device)
    owner[flat.long()] = torch.arange(len(flat), device=pool_row.device)
    holders = owner[1:]
    free = (~routed.flatten()[holders] | (holders < 0)).nonzero().squeeze(1)[: len(branches)]
    previous = holders[free]
    flat[previous[previous >= 0]] = 0
    flat[branches[: len(free)]] = (free + 1).to(pool_row.dtype)
    return pool_row


_library.impl("variable_k_outputs", variable_k_outputs, "CompositeExplicitAutograd")
_library.impl("refresh_variable_k", refresh_variable_k, "CompositeExplicitAutograd")


@torch.library.register_fake("moeca::variable_k_outputs", lib=_library)
def _(rows, routed, weight, parameters, body, width, slots):  # type: ignore[no-untyped-def]
    out, pool = (rows[0].new_empty(count, width) for count in (len(routed), slots))
    return out, pool, torch.empty_like(routed, dtype=torch.int32), torch.empty_like(routed, dtype=torch.float32)


@torch.library.register_fake("moeca::refresh_variable_k", lib=_library)
def _(pool, slope, rows, pool_row, routed, mask, weight, distance, parameters, body):  # type: ignore[no-untyped-def]
    out = rows[0].new_empty(len(routed), pool.shape[1])
    return out, torch.empty_like(pool_row), torch.empty_like(routed, dtype=torch.float32)
