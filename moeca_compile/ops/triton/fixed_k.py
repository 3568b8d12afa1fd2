"""`fixed_k_outputs` and `refresh_fixed_k` on CUDA (the references are in ops.fixed_k)."""

from __future__ import annotations

from torch import Tensor

from moeca_compile.ops import fixed_k as reference
from moeca_compile.ops.triton.body_plan import kernel_plan
from moeca_compile.ops.triton.body_run import run_body
from moeca_compile.ops.triton.combine import combine_fixed_k
from moeca_compile.ops.triton.compaction import sort_by_expert
from moeca_compile.ops.triton.fallback import or_by_aten
from moeca_compile.ops.triton.rows import write_outputs


@or_by_aten(reference.fixed_k_outputs)
def fixed_k_outputs(
    rows: list[Tensor], index: Tensor, parameters: list[Tensor], experts: int, body: str, width: int
) -> Tensor:
    """As `ops.fixed_k.fixed_k_outputs`. The last product writes each output to its place."""
    out = rows[0].new_empty(*index.shape, width)
    _write_outputs(out, rows, index, parameters, experts, body)
    return out


@or_by_aten(reference.fixed_k_outputs_into)
def fixed_k_outputs_into(
    out: Tensor, rows: list[Tensor], index: Tensor, parameters: list[Tensor], experts: int, body: str
) -> None:
    """As `ops.fixed_k.fixed_k_outputs_into`."""
    _write_outputs(out, rows, index, parameters, experts, body)


def _write_outputs(
    out: Tensor, rows: list[Tensor], index: Tensor, parameters: list[Tensor], experts: int, body: str
) -> None:
    plan = kernel_plan(body, rows, parameters, experts)
    branches = sort_by_expert(index, None, experts, index.shape[1])
    run_body(plan, rows, branches, parameters, out.view(branches.capacity, -1))


@or_by_aten(reference.refresh_fixed_k)
def refresh_fixed_k(
    ring: list[Tensor],
    rows: list[Tensor],
    index: Tensor,
    mask: Tensor,
    chosen: Tensor,
    weight: Tensor,
    history: Tensor | None,
    forecast: Tensor | None,
    parameters: list[Tensor],
    experts: int,
    body: str,
) -> tuple[Tensor, Tensor]:
    """As `ops.fixed_k.refresh_fixed_k`.

    The last product writes to a buffer by position. Another kernel then computes norms, subtracts the forecast and
    writes to the ring. Doing this in the product would save no launch: a program has only a part of a row, so a
    second kernel would have to add up the norms. The buffer has the chosen rows only and stays in the L2 cache.
    """
    plan = kernel_plan(body, rows, parameters, experts)
    branches = sort_by_expert(index, mask, experts, index.shape[2])
    fresh = run_body(plan, rows, branches, parameters)
    norms = write_outputs(fresh, branches, ring, history, forecast, chosen=chosen)
    return combine_fixed_k(ring, weight, history, forecast), norms.view(mask.shape)
