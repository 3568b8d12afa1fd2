"""Expert outputs where every token has k experts: of all branches at a full step, of the stale ones at a cache step.

    fixed_k_outputs(rows, index, ...) -> out

        out[t, j] = expert_index[t, j](rows[t])

    refresh_fixed_k(ring, rows, index, mask, chosen, weight, history, forecast, ...) -> combined, norms

        value[n, j] = sum_r forecast[history[n, j] - 1, r] * ring[r][n, j]
        ring[r][n, j] += expert_index[c, j](rows[c]) - value[n, j]             where mask[c, j], with n = chosen[c]
        combined[n] = sum_j weight[n, j] * value[n, j]                         of the new values

A branch is a (token, expert) pair; its output is the expert's row before weighting. The cache has k places for each
token, one for each of its branches, in each of the K tensors of its ring (`ops.ring`). Without a forecast K is 1, and
a value is what its only slot holds. `fixed_k_outputs_into` is `fixed_k_outputs` that writes into a given tensor.

Each op is one plain function of ATen ops that runs on any device. It is the reference for the kernels in
`ops.triton.fixed_k`, which run instead on CUDA. The functions read the number of branches on the host, so tracing
uses the fakes at the end of the file, which give the output shapes.

Shapes: B samples, N tokens, C chosen tokens, T rows (B * N, or B * C), M branches. The *place* of a branch is its
flat index in (T, k).
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from moeca_compile.ops import bodies
from moeca_compile.ops.body_run import run_by_expert
from moeca_compile.ops.cpu import library
from moeca_compile.ops.ring import by_history, moved_to, weighted_sum

_library = torch.library.Library("moeca", "FRAGMENT")
_library.define(
    "fixed_k_outputs(Tensor[] rows, Tensor index, Tensor[] parameters, int experts, str body, int width) -> Tensor"
)
_library.define(
    "fixed_k_outputs_into(Tensor(a!) out, Tensor[] rows, Tensor index, Tensor[] parameters, int experts, str body) "
    "-> ()"
)
_library.define(
    "refresh_fixed_k(Tensor(a!)[] ring, Tensor[] rows, Tensor index, Tensor mask, Tensor chosen, Tensor weight, "
    "Tensor? history, Tensor? forecast, Tensor[] parameters, int experts, str body) -> (Tensor, Tensor)"
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
    result = rows[0].new_empty(*index.shape, width)
    fixed_k_outputs_into(result, rows, index, parameters, experts, body)
    return result


def fixed_k_outputs_into(
    out: Tensor, rows: list[Tensor], index: Tensor, parameters: list[Tensor], experts: int, body: str
) -> None:
    """Write what `fixed_k_outputs` returns into `out`: contiguous, T * k rows of the outputs' width and dtype."""
    flat = index.flatten()
    places = torch.arange(flat.numel(), device=flat.device)
    expert_outputs(rows, flat, places, index.shape[1], parameters, experts, body, out.view(flat.numel(), -1))


def expert_outputs(
    rows: list[Tensor],
    expert: Tensor,
    places: Tensor,
    k: int,
    parameters: list[Tensor],
    experts: int,
    body: str,
    out: Tensor | None = None,
) -> Tensor:
    """Run each expert on its rows.

    Args:
        rows: inputs of the experts, each (T, ...).
        expert: (M,) expert ids of the branches.
        places: (M,) places of the branches.
        k: places a row.
        parameters, experts, body: as in `fixed_k_outputs`.
        out: (M, width) to write to; None for a new tensor.

    Returns:
        (M, width) outputs of the branches, in their order.
    """
    order = expert.argsort(stable=True)
    ends = torch.bincount(expert, minlength=experts).cumsum(0)
    for part, found in run_by_expert(body, rows, F.pad(ends, (1, 0)), parameters, experts, places[order] // k, k):
        if out is None:
            out = found.new_empty(len(expert), *found.shape[1:])
        out.index_copy_(0, order[part], found.to(out.dtype))
    assert out is not None, "there is one part at least"
    return out


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
    """Recompute the branches of `mask` into the cache, then combine the branches of all tokens (paper, eq. 8).

    A recomputed branch moves by the same amount in all slots of the ring, so that its forecast is the fresh output.

    Args:
        ring: K tensors (B, N, k, width), the last K outputs of the branches, written in place.
        rows: inputs of the experts for the chosen tokens, each (B * C, ...).
        index: (B, C, k) expert ids of the chosen tokens' branches.
        mask: (B, C, k) bool, which branches to recompute.
        chosen: (B, C) token indices, distinct within a sample.
        weight: (B, N, k) current weights of all tokens.
        history: (B, N, k) how many of the ring's outputs are the branch's own, 1 where it is new; None where K is 1.
        forecast: (K, K) the weights of the slots, by history; None where K is 1.
        parameters, experts, body: as in `fixed_k_outputs`.

    Returns:
        (B, N, width) combined output; (B, C, k) norms of the recomputed branches, 0 elsewhere.
    """
    samples, tokens, k, _ = ring[0].shape
    norms = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    weights = branch_weights(history, forecast)
    places = mask.flatten().nonzero().squeeze(1)
    if places.numel() or bodies.exchange_of(body)[0]:  # other ranks may have rows for this one's experts
        first = torch.arange(samples, device=chosen.device)[:, None] * tokens
        cached = ((chosen + first)[..., None] * k + torch.arange(k, device=chosen.device)).flatten()[places]
        outputs = expert_outputs(rows, index.flatten()[places], places, k, parameters, experts, body)
        norms.view(-1).index_copy_(0, places, outputs.norm(dim=-1).to(torch.float32))
        write_branches(ring, cached, outputs, None if weights is None else weights.flatten(0, 2)[cached])
    return _combine(ring, weight, weights), norms


def branch_weights(history: Tensor | None, forecast: Tensor | None) -> Tensor | None:
    """(..., K) the weights of each branch's slots; None where there is one slot."""
    return None if history is None or forecast is None else by_history(forecast, history)


def write_branches(ring: list[Tensor], at: Tensor, outputs: Tensor, weights: Tensor | None) -> None:
    """Write outputs (M, width) into the rows `at` (M,) of the ring's tensors, so that weights (M, K) give them."""
    width, moved = outputs.shape[1], [outputs]
    if weights is not None:
        before = [slot.view(-1, width).index_select(0, at) for slot in ring]
        moved = moved_to(outputs, before, weights[:, None])
    for slot, value in zip(ring, moved, strict=True):
        slot.view(-1, width).index_copy_(0, at, value.to(slot.dtype))


def _combine(ring: list[Tensor], weight: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of weight * value over a token's branches: (B, N, width)."""
    dtype = torch.promote_types(ring[0].dtype, torch.float32)
    factors = weight[..., None].to(dtype)
    if weights is not None:
        factors = factors * weights.to(dtype)
    combined = library.combine(ring, factors)
    if combined is not None:
        return combined
    each = (weighted_sum([slot[:, :, j] for slot in ring], factors[:, :, j, None]) for j in range(weight.shape[2]))
    return reduce(torch.add, each).to(ring[0].dtype)


_library.impl("fixed_k_outputs", fixed_k_outputs, "CompositeExplicitAutograd")
_library.impl("fixed_k_outputs_into", fixed_k_outputs_into, "CompositeExplicitAutograd")
_library.impl("refresh_fixed_k", refresh_fixed_k, "CompositeExplicitAutograd")


@torch.library.register_fake("moeca::fixed_k_outputs", lib=_library)
def _(rows, index, parameters, experts, body, width):  # type: ignore[no-untyped-def]
    return rows[0].new_empty(*index.shape, width)


@torch.library.register_fake("moeca::fixed_k_outputs_into", lib=_library)
def _(out, rows, index, parameters, experts, body):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("moeca::refresh_fixed_k", lib=_library)
def _(ring, rows, index, mask, chosen, weight, history, forecast, parameters, experts, body):  # type: ignore[no-untyped-def]
    return torch.empty_like(ring[0][:, :, 0]), mask.new_empty(mask.shape, dtype=torch.float32)
