"""`fixed_k_outputs` and `refresh_fixed_k` by kernels (ops.fixed_k has their contract)."""

from __future__ import annotations

from torch import Tensor

from moeca_compile.ops import fixed_k as reference
from moeca_compile.ops.triton.body_run import run_body
from moeca_compile.ops.triton.combine import combine_slots
from moeca_compile.ops.triton.compaction import sort_branches
from moeca_compile.ops.triton.plans import plan_for, tell
from moeca_compile.ops.triton.rows import write_branches
from moeca_compile.ops.triton.unsupported import UnsupportedError


def fixed_k_outputs(
    rows: list[Tensor], index: Tensor, parameters: list[Tensor], experts: int, body: str, width: int
) -> Tensor:
    """As `ops.fixed_k.fixed_k_outputs`: every branch, its output written where it belongs."""
    try:
        plan = plan_for(body, rows, parameters, experts)
        order = sort_branches(index, None, experts, index.shape[1])
        outputs = run_body(plan, rows, order, parameters, scatter=True)
    except UnsupportedError as reason:
        tell("fixed_k_outputs", reason)
        return reference.fixed_k_outputs(rows, index, parameters, experts, body, width)
    return outputs.to(rows[0].dtype).view(*index.shape, width)


def refresh_fixed_k(
    cache: Tensor,
    rows: list[Tensor],
    index: Tensor,
    mask: Tensor,
    matched: Tensor,
    chosen: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    ratio: Tensor,
    parameters: list[Tensor],
    experts: int,
    body: str,
) -> tuple[Tensor, Tensor]:
    """As `ops.fixed_k.refresh_fixed_k`.

    The last product writes to a buffer by position, and a pass over its rows takes norms, subtracts the forecast and
    writes the cache. To do that in the product itself would need the norms' parts from all its programs and a pass to
    add them up, so it would launch as much; the buffer, of the chosen rows only, stays in the L2 cache.
    """
    try:
        plan = plan_for(body, rows, parameters, experts)
        order = sort_branches(index, mask, experts, index.shape[2])
        fresh = run_body(plan, rows, order, parameters, scatter=False)
    except UnsupportedError as reason:
        tell("refresh_fixed_k", reason)
        given = (cache, rows, index, mask, matched, chosen, weight, slope, ratio, parameters, experts, body)
        return reference.refresh_fixed_k(*given)
    norms = write_branches(fresh, order, cache, slope, ratio, matched, chosen=chosen)
    return combine_slots(cache, slope, ratio, weight), norms.view(mask.shape)
