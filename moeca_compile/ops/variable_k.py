"""Expert outputs where tokens have any number of experts (expert choice, dynamic capacity).

    variable_k_outputs(rows, routed, weight, slots, ...) -> combined, pool, place, norms

        pool[place[t, e] - 1] = expert_e(rows[t])                          for the first `slots` with routed[t, e]
        combined[t] = sum_e routed[t, e] * weight[t, e] * expert_e(rows[t])

    refresh_variable_k(pool, slope, rows, place, routed, mask, weight, ratio, ...) -> combined, place, norms

        pool[p] = expert_e(rows[t]) - ratio * slope[p]                     where mask[t, e], with p = place[t, e] - 1
        combined[t] = sum_e routed[t, e] * weight[t, e] * (pool[p] + ratio * slope[p])

The outputs of the branches lie in a pool of rows; `place` (T, E) says which row a branch has: its number counted from
1, or 0 for none. A branch that finds no row left is computed all the same, but not cached.
The ops are written as those of `ops.fixed_k` are; the pool is written inside them only.
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
    "refresh_variable_k(Tensor(a!) pool, Tensor(b!)? slope, Tensor[] rows, Tensor place, Tensor routed, Tensor mask, "
    "Tensor weight, Tensor ratio, Tensor[] parameters, str body) -> (Tensor, Tensor, Tensor)"
)


def variable_k_outputs(
    rows: list[Tensor], routed: Tensor, weight: Tensor, parameters: list[Tensor], body: str, width: int, slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All routed branches, combined; the first of them are cached.

    Args:
        rows: what enters the experts, each (T, ...).
        routed: (T, E) bool, which branches there are; weight: (T, E) their weights.
        parameters: expert-major, E * P tensors.
        body: key of the expert body (ops.bodies).
        width: width of an expert's output.
        slots: rows of the pool.

    Returns:
        (T, width) combined output; (slots, width) pool; (T, E) int32 places; (T, E) norms, 0 where none is cached.
    """
    branches, fresh = _run(rows, routed, parameters, body, width)
    out = _add_up(fresh, branches, weight).to(fresh.dtype)
    count = min(slots, len(branches))
    pool = fresh.new_zeros(slots, width)
    pool[:count] = fresh[:count]
    place, norms = torch.zeros_like(routed, dtype=torch.int32), torch.zeros_like(routed, dtype=torch.float32)
    place.view(-1)[branches[:count]] = torch.arange(1, count + 1, dtype=torch.int32, device=place.device)
    norms.view(-1)[branches[:count]] = fresh[:count].norm(dim=-1).to(torch.float32)
    return out, pool, place, norms


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
    """Recompute the branches of `mask` into the pool, then combine all routed ones (paper, eq. 8).

    A branch without a row takes one that no routed branch holds, and its slope starts at 0.

    Args:
        pool: (slots, width) outputs of the branches, written in place.
        slope: (slots, width) change of a branch between full steps, written in place, or None.
        rows, weight, parameters, body: as in `variable_k_outputs`.
        place: (T, E) int32 places in the pool.
        routed: (T, E) bool, the branches that the output is made of; mask: which of them are computed anew.
        ratio: scalar, how far the forecast reaches in units of the slope.

    Returns:
        (T, width) combined output; (T, E) int32 places; (T, E) norms of the recomputed branches, 0 elsewhere.
    """
    branches, fresh = _run(rows, mask, parameters, body, pool.shape[1])
    norms = torch.zeros_like(routed, dtype=torch.float32)
    norms.view(-1)[branches] = fresh.norm(dim=-1).to(torch.float32)
    had_row = place.view(-1)[branches] > 0
    place = _with_places(place, routed, branches[~had_row], len(pool))
    row = place.view(-1)[branches].long() - 1
    cached = row >= 0
    values = fresh[cached]
    if slope is not None:
        slope.index_fill_(0, row[cached & ~had_row], 0.0)
        values = values - ratio * slope[row[cached]]
    pool.index_copy_(0, row[cached], values.to(pool.dtype))
    out = _combined(pool, slope, place, routed, weight, ratio) + _add_up(fresh[~cached], branches[~cached], weight)
    return out.to(fresh.dtype), place, norms


def _run(rows: list[Tensor], mask: Tensor, parameters: list[Tensor], body: str, width: int) -> tuple[Tensor, Tensor]:
    """The branches of `mask` as flat places (M,), in order of tokens, and their outputs (M, width)."""
    experts = mask.shape[1]
    branches = mask.flatten().nonzero().squeeze(1)
    order, values = expert_outputs(rows, branches % experts, branches, experts, parameters, experts, body)
    outputs = rows[0].new_empty(len(branches), width)
    return branches, outputs.index_copy_(0, order, values.to(outputs.dtype))


def _add_up(outputs: Tensor, branches: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight * output over each token's branches, (T, width), in at least float32."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    out = torch.zeros(len(weight), outputs.shape[1], dtype=dtype, device=outputs.device)
    weighted = outputs.to(dtype) * weight.flatten()[branches].to(dtype)[:, None]
    return out.index_add_(0, branches // weight.shape[1], weighted)


def _combined(
    pool: Tensor, slope: Tensor | None, place: Tensor, routed: Tensor, weight: Tensor, ratio: Tensor
) -> Tensor:
    """Sum of weight * (cached output + ratio * slope) over a token's routed branches that have a row: (T, width)."""
    branches = (routed & (place > 0)).flatten().nonzero().squeeze(1)
    row = place.view(-1)[branches].long() - 1
    outputs = pool[row]
    if slope is not None:
        outputs = outputs + ratio * slope[row]
    return _add_up(outputs, branches, weight)


def _with_places(place: Tensor, routed: Tensor, branches: Tensor, slots: int) -> Tensor:
    """The places when `branches` take, in order, the rows that no routed one holds; who held those loses them."""
    place = place.clone()
    flat = place.view(-1)
    owner = torch.full((slots + 1,), -1, device=place.device)
    owner[flat.long()] = torch.arange(len(flat), device=place.device)
    holders = owner[1:]
    free = (~routed.flatten()[holders] | (holders < 0)).nonzero().squeeze(1)[: len(branches)]
    before = holders[free]
    flat[before[before >= 0]] = 0
    flat[branches[: len(free)]] = (free + 1).to(place.dtype)
    return place


_library.impl("variable_k_outputs", variable_k_outputs, "CompositeExplicitAutograd")
_library.impl("refresh_variable_k", refresh_variable_k, "CompositeExplicitAutograd")


@torch.library.register_fake("moeca::variable_k_outputs", lib=_library)
def _(rows, routed, weight, parameters, body, width, slots):  # type: ignore[no-untyped-def]
    out, pool = (rows[0].new_empty(count, width) for count in (len(routed), slots))
    return out, pool, torch.empty_like(routed, dtype=torch.int32), torch.empty_like(routed, dtype=torch.float32)


@torch.library.register_fake("moeca::refresh_variable_k", lib=_library)
def _(pool, slope, rows, place, routed, mask, weight, ratio, parameters, body):  # type: ignore[no-untyped-def]
    out = rows[0].new_empty(len(routed), pool.shape[1])
    return out, torch.empty_like(place), torch.empty_like(routed, dtype=torch.float32)
