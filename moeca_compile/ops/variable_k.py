"""Expert outputs where a token has any number of experts (expert choice, dynamic capacity).

    variable_k_outputs(rows, routed, weight, pool_row, slots, ...) -> combined, pool, pool_row, norms

        pool[pool_row[t, e] - 1] = expert_e(rows[t])                       for the first `slots` with routed[t, e]
        combined[t] = sum_e routed[t, e] * weight[t, e] * expert_e(rows[t])

    refresh_variable_k(ring, rows, pool_row, routed, mask, weight, history, forecast, ...)
        -> combined, pool_row, norms

        value[t, e] = sum_r forecast[history[t, e] - 1, r] * ring[r][p]            with p = pool_row[t, e] - 1
        ring[r][p] += expert_e(rows[t]) - value[t, e]                              where mask[t, e]
        combined[t] = sum_e routed[t, e] * weight[t, e] * value[t, e]              of the new values

The cached outputs of branches are rows of a pool. `pool_row` (T, E) has each branch's row, counted from 1; 0 means
that it is not cached. If the pool is full, further branches are computed but not cached. A ring (`ops.ring`) has a
pool for each of the last K full steps, and a branch has the same row in all of them.

As in `ops.fixed_k`, each op is a plain function of ATen ops, and the reference for its CUDA kernels;
`variable_k_outputs_into` is `variable_k_outputs` that writes into a given pool. The *place* of a branch is its flat
index in (T, E).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeca_compile.ops.fixed_k import branch_weights, expert_outputs, write_branches
from moeca_compile.ops.ring import weighted_sum

_library = torch.library.Library("moeca", "FRAGMENT")
_library.define(
    "variable_k_outputs(Tensor[] rows, Tensor routed, Tensor weight, Tensor? pool_row, Tensor[] parameters, "
    "str body, int width, int slots) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "variable_k_outputs_into(Tensor(a!) pool, Tensor[] rows, Tensor routed, Tensor weight, Tensor? pool_row, "
    "Tensor[] parameters, str body) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "refresh_variable_k(Tensor(a!)[] ring, Tensor[] rows, Tensor pool_row, Tensor routed, Tensor mask, "
    "Tensor weight, Tensor? history, Tensor? forecast, Tensor[] parameters, str body) -> (Tensor, Tensor, Tensor)"
)


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
    """Run and combine all routed branches, and cache the first `slots` of them.

    Args:
        rows: inputs of the experts, each (T, ...).
        routed: (T, E) bool, which pairs are branches.
        weight: (T, E) their weights.
        pool_row: (T, E) int32 rows of the branches so far, which those that stay branches keep; None for none.
        parameters: expert-major, E * P tensors.
        body: key of the expert body (ops.bodies).
        width: width of an expert's output.
        slots: number of rows of the pool.

    Returns:
        (T, width) combined output; (slots, width) pool; (T, E) int32 rows in the pool, counted from 1, or 0 for none;
        (T, E) norms of the cached outputs, 0 elsewhere.
    """
    pool = rows[0].new_zeros(slots, width)
    out, pool_row, norms = variable_k_outputs_into(pool, rows, routed, weight, pool_row, parameters, body)
    return out, pool, pool_row, norms


def variable_k_outputs_into(
    pool: Tensor,
    rows: list[Tensor],
    routed: Tensor,
    weight: Tensor,
    pool_row: Tensor | None,
    parameters: list[Tensor],
    body: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`variable_k_outputs` into `pool` (slots, width); its rows that no branch has keep what they hold."""
    routed = routed.contiguous()  # a router that works expert by expert may have it the other way round
    pool_row = None if pool_row is None else pool_row.contiguous()
    branches, fresh = _run(rows, routed, parameters, body, pool.shape[1])
    out = _add_up(fresh, branches, weight).to(fresh.dtype)
    count = min(len(pool), len(branches))
    cached, values = branches[:count], fresh[:count]
    pool_row = _rows_of(cached, routed, pool_row, len(pool))
    pool.index_copy_(0, pool_row.view(-1)[cached].long() - 1, values.to(pool.dtype))
    norms = torch.zeros_like(routed, dtype=torch.float32)
    norms.view(-1)[cached] = values.norm(dim=-1).to(torch.float32)
    return out, pool_row, norms


def _rows_of(cached: Tensor, routed: Tensor, before: Tensor | None, slots: int) -> Tensor:
    """Rows in the pool (T, E) for the branches at the places `cached`: those that they had, or free ones in order."""
    keeps = torch.zeros_like(routed)
    keeps.view(-1)[cached] = True
    before = torch.zeros_like(routed, dtype=torch.int32) if before is None else torch.where(keeps, before, 0)
    return _assign_rows(before, keeps, cached[before.view(-1)[cached] == 0], slots)


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
    """Recompute the branches of `mask` into the pools, then combine all routed ones (paper, eq. 8).

    A recomputed branch without a row takes one that no routed branch has.

    Args:
        ring: K pools (slots, width), the last K outputs of the branches, written in place.
        rows, weight, parameters, body: as in `variable_k_outputs`.
        pool_row: (T, E) int32 rows in the pools, counted from 1, or 0 for none.
        routed: (T, E) bool, which pairs are branches.
        mask: (T, E) bool, which branches to recompute.
        history: (T, E) of how many pools the branch has outputs in, 1 where it is new; None where K is 1.
        forecast: (K, K) the weights of the pools, by history; None where K is 1.

    Returns:
        (T, width) combined output; (T, E) int32 rows in the pools as they are now; (T, E) norms of the recomputed
        branches, 0 elsewhere.
    """
    slots, width = ring[0].shape
    routed, mask, pool_row = routed.contiguous(), mask.contiguous(), pool_row.contiguous()
    branches, fresh = _run(rows, mask, parameters, body, width)
    norms = torch.zeros_like(routed, dtype=torch.float32)
    norms.view(-1)[branches] = fresh.norm(dim=-1).to(torch.float32)
    pool_row = _assign_rows(pool_row, routed, branches[pool_row.view(-1)[branches] == 0], slots)
    row = pool_row.view(-1)[branches].long() - 1
    cached, weights = row >= 0, branch_weights(history, forecast)
    own = None if weights is None else weights.flatten(0, 1)[branches[cached]]
    write_branches(ring, row[cached], fresh[cached], own)
    out = _combined(ring, pool_row, routed, weight, weights) + _add_up(fresh[~cached], branches[~cached], weight)
    return out.to(fresh.dtype), pool_row, norms


def _run(rows: list[Tensor], mask: Tensor, parameters: list[Tensor], body: str, width: int) -> tuple[Tensor, Tensor]:
    """The places (M,) of the branches of `mask`, in order, and their outputs (M, width)."""
    experts = mask.shape[1]
    branches = mask.flatten().nonzero().squeeze(1)
    out = rows[0].new_empty(len(branches), width)
    return branches, expert_outputs(rows, branches % experts, branches, experts, parameters, experts, body, out)


def _add_up(outputs: Tensor, branches: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight * output over each token's branches: (T, width) in float32 or float64."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    out = torch.zeros(len(weight), outputs.shape[1], dtype=dtype, device=outputs.device)
    weighted = outputs.to(dtype) * weight.flatten()[branches].to(dtype)[:, None]
    return out.index_add_(0, branches // weight.shape[1], weighted)


def _combined(ring: list[Tensor], pool_row: Tensor, routed: Tensor, weight: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of weight * value over each token's cached branches: (T, width)."""
    branches = (routed & (pool_row > 0)).flatten().nonzero().squeeze(1)
    row = pool_row.view(-1)[branches].long() - 1
    outputs = [pool[row] for pool in ring]
    value = outputs[0] if weights is None else weighted_sum(outputs, weights.flatten(0, 1)[branches, None])
    return _add_up(value, branches, weight)


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
_library.impl("variable_k_outputs_into", variable_k_outputs_into, "CompositeExplicitAutograd")
_library.impl("refresh_variable_k", refresh_variable_k, "CompositeExplicitAutograd")


@torch.library.register_fake("moeca::variable_k_outputs", lib=_library)
def _(rows, routed, weight, pool_row, parameters, body, width, slots):  # type: ignore[no-untyped-def]
    out, pool = (rows[0].new_empty(count, width) for count in (len(routed), slots))
    return out, pool, *_rows_and_norms(routed)


@torch.library.register_fake("moeca::variable_k_outputs_into", lib=_library)
def _(pool, rows, routed, weight, pool_row, parameters, body):  # type: ignore[no-untyped-def]
    return rows[0].new_empty(len(routed), pool.shape[1]), *_rows_and_norms(routed)


@torch.library.register_fake("moeca::refresh_variable_k", lib=_library)
def _(ring, rows, pool_row, routed, mask, weight, history, forecast, parameters, body):  # type: ignore[no-untyped-def]
    return rows[0].new_empty(len(routed), ring[0].shape[1]), *_rows_and_norms(routed)


def _rows_and_norms(routed: Tensor) -> tuple[Tensor, Tensor]:
    return routed.new_empty(routed.shape, dtype=torch.int32), routed.new_empty(routed.shape, dtype=torch.float32)
