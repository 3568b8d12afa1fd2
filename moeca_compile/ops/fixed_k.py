"""Expert outputs where every token has k experts: of all branches at a full step, of the stale ones at a cache step.

    fixed_k_outputs(rows, index, ...) -> out

        out[t, j] = expert_index[t, j](rows[t])

    refresh_fixed_k(cache, slope, rows, index, mask, chosen, weight, distance, ...) -> combined, norms

        cache[n, j] = expert_index[c, j](rows[c]) - distance * slope[n, j]    where mask[c, j], with n = chosen[c]
        combined[n] = sum_j weight[n, j] * (cache[n, j] + distance * slope[n, j])

A branch is a (token, expert) pair; its output is the expert's row before weighting. The cache has k slots for each
token, one for each of its branches. Of all ops, only `refresh_fixed_k` writes to it.

Each op is one plain function of ATen ops that runs on any device. It is the reference for the kernels in
`ops.triton.fixed_k`, which run instead on CUDA. The functions read the number of branches on the host, so tracing
uses the fakes at the end of the file, which give the output shapes.

Shapes: B samples, N tokens, C chosen tokens, T rows (B * N, or B * C), M branches. The *place* of a branch is its
flat index in (T, k).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeca_compile.ops.body_run import run_by_expert
from moeca_compile.ops.cpu import library

_library = torch.library.Library("moeca", "FRAGMENT")
_library.define(
    "fixed_k_outputs(Tensor[] rows, Tensor index, Tensor[] parameters, int experts, str body, int width) -> Tensor"
)
_library.define(
    "refresh_fixed_k(Tensor(a!) cache, Tensor[] rows, Tensor index, Tensor mask, Tensor matched, Tensor chosen, "
    "Tensor weight, Tensor(b!)? slope, Tensor distance, Tensor[] parameters, int experts, str body) "
    "-> (Tensor, Tensor)"
)


def fixed_k_outputs(
    rows: list[Tensor], index: Tensor, parameters: list[Tensor], experts: int, body: str, width: int
) -> Tensor:
    """Outputs of all branches, before weighting.

    Args:
        rows: inputs of the experts, each (T, ...).
        index: (T, k) expert ids.
        parameters: expert-major, experts * P tensors.
        experts: number of experts E.
        body: key of the expert body (ops.bodies).
        width: width of an expert's output.

    Returns:
        (T, k, width).
    """
    flat = index.flatten()
    places = torch.arange(flat.numel(), device=flat.device)
    order, outputs = expert_outputs(rows, flat, places, index.shape[1], parameters, experts, body)
    result = rows[0].new_empty(flat.numel(), width)
    return result.index_copy_(0, order, outputs.to(result.dtype)).view(*index.shape, width)


def expert_outputs(
    rows: list[Tensor], expert: Tensor, places: Tensor, k: int, parameters: list[Tensor], experts: int, body: str
) -> tuple[Tensor, Tensor]:
    """Run each expert on its rows.

    Args:
        rows: inputs of the experts, each (T, ...).
        expert: (M,) expert ids of the branches.
        places: (M,) places of the branches.
        k: places a row.
        parameters, experts, body: as in `fixed_k_outputs`.

    Returns:
        (M,) indices into `expert` that sort it; (M, width) outputs in that order.
    """
    order = expert.argsort(stable=True)
    ends = torch.bincount(expert, minlength=experts).cumsum(0)
    source = places[order] // k
    sorted_rows = [value.index_select(0, source) for value in rows]
    return order, run_by_expert(body, sorted_rows, F.pad(ends, (1, 0)), parameters, experts)


def refresh_fixed_k(
    cache: Tensor,
    rows: list[Tensor],
    index: Tensor,
    mask: Tensor,
    matched: Tensor,
    chosen: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    distance: Tensor,
    parameters: list[Tensor],
    experts: int,
    body: str,
) -> tuple[Tensor, Tensor]:
    """Recompute the branches of `mask` into the cache, then combine the branches of all tokens (paper, eq. 8).

    Args:
        cache: (B, N, k, width) branch outputs by slot, written in place.
        rows: inputs of the experts for the chosen tokens, each (B * C, ...).
        index: (B, C, k) expert ids by slot of the chosen tokens.
        mask: (B, C, k) bool, which branches to recompute.
        matched: (B, C, k) bool, whether the slot already holds this branch; if not, its slope becomes 0.
        chosen: (B, C) token indices, distinct within a sample.
        weight: (B, N, k) current weights of all tokens by slot.
        slope: (B, N, k, width) change of each branch between full steps, written in place; None without a forecast.
        distance: scalar, the forecast distance: time since the last full step, in intervals between full steps.
        parameters, experts, body: as in `fixed_k_outputs`.

    Returns:
        (B, N, width) combined output; (B, C, k) norms of the recomputed branches, 0 elsewhere.
    """
    samples, tokens, k, width = cache.shape
    norms = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    places = mask.flatten().nonzero().squeeze(1)
    if places.numel():
        first = torch.arange(samples, device=chosen.device)[:, None] * tokens
        slots = ((chosen + first)[..., None] * k + torch.arange(k, device=chosen.device)).flatten()[places]
        if slope is not None:
            slope.view(-1, width).index_fill_(0, slots[~matched.flatten()[places]], 0.0)
        order, outputs = expert_outputs(rows, index.flatten()[places], places, k, parameters, experts, body)
        slots = slots[order]
        norms.view(-1).index_copy_(0, places[order], outputs.norm(dim=-1).to(torch.float32))
        if slope is not None:
            outputs = outputs - distance * slope.view(-1, width).index_select(0, slots)
        cache.view(-1, width).index_copy_(0, slots, outputs.to(cache.dtype))
    return _combine(cache, slope, distance, weight), norms


def _combine(cache: Tensor, slope: Tensor | None, distance: Tensor, weight: Tensor) -> Tensor:
    """Sum over slots of weight * (cached output + distance * slope): (B, N, width)."""
    combined = library.combine(cache, slope, distance, weight)
    if combined is not None:
        return combined
    result = torch.zeros_like(cache[:, :, 0])
    for slot in range(cache.shape[2]):
        w = weight[:, :, slot, None].to(cache.dtype)
        result.addcmul_(cache[:, :, slot], w)
        if slope is not None:
            result.addcmul_(slope[:, :, slot], w * distance)
    return result


_library.impl("fixed_k_outputs", fixed_k_outputs, "CompositeExplicitAutograd")
_library.impl("refresh_fixed_k", refresh_fixed_k, "CompositeExplicitAutograd")


@torch.library.register_fake("moeca::fixed_k_outputs", lib=_library)
def _(rows, index, parameters, experts, body, width):  # type: ignore[no-untyped-def]
    return rows[0].new_empty(*index.shape, width)


@torch.library.register_fake("moeca::refresh_fixed_k", lib=_library)
def _(cache, rows, index, mask, matched, chosen, weight, slope, distance, parameters, experts, body):  # type: ignore[no-untyped-def]
    return torch.empty_like(cache[:, :, 0]), mask.new_empty(mask.shape, dtype=torch.float32)
