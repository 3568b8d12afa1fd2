"""Validation on the real first inputs: no rewritten graph is used before it has been compared with the original.

`sound_regions` checks the rewrite, before anything is compiled, and takes out of the plan what fails.
`same_outputs` checks what lowering made of a graph, when a program is first used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.match.regions import Attention, Experts, FeedForward, Regions, Skipped
from moeca_compile.passes.rewrite.step import StepKind
from moeca_compile.passes.rewrite.step_function import step_function
from moeca_compile.policies import caching_policy
from moeca_compile.policies.plain import Plain
from moeca_compile.runtime.record import Record

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Greatest error that passes. For float32 and float64 it is the greatest difference over the greatest magnitude;
in lower precision a few routings flip by rounding, so there it is the root mean square of both. It goes by the
coarsest type that tokens are computed in: a model in float64 may have a router in float32."""


class ValidationError(RuntimeError):
    """A compiled step differs from what it stands for."""


def sound_regions(
    graph: fx.Graph, regions: Regions, config: MoecaConfig, inputs: Sequence[Any], record: Record
) -> Regions:
    """The regions whose rewrite is right on these inputs; the others are moved to `kept` with the reason."""
    reason = _fault(graph, regions, config, inputs, record)
    if reason is None:
        return regions
    faults = {part: _fault(graph, _alone(regions, part), config, inputs, None) for part in _parts(regions)}
    rest = _without(regions, {part: why for part, why in faults.items() if why is not None})
    left = _fault(graph, rest, config, inputs, record)
    if left is not None:
        record.warn(f"the rewritten step differs from the model ({left}), so the model runs uncached")
        rest = _without(rest, dict.fromkeys(_parts(rest), left))
        return replace(rest, residuals=())
    for skipped in rest.skipped[len(regions.skipped) :]:
        record.warn(f"{skipped.kind} {skipped.name} stays as it is: {skipped.reason}")
    return rest


def _fault(
    graph: fx.Graph, regions: Regions, config: MoecaConfig, inputs: Sequence[Any], record: Record | None
) -> str | None:
    """Why a full step, or a cache step with forced recomputation right after it, is not the model; else None.

    On the inputs of the full step it makes no difference what is recomputed: all tokens, half of them, or none.
    """
    main = regions.main
    if main is None or (config.family == "stack" and not regions.stacks):
        return None
    policy, inside = caching_policy(config, regions), token_dtypes(regions)
    if not policy.specs():
        return None
    device = regions.residuals[0].stream.meta["val"].device
    state = {s.name: torch.zeros(s.shape, dtype=s.dtype, device=device) for s in policy.specs()}
    clock = torch.zeros(2, 2, device=device)
    tokens = main.tokens
    try:
        with torch.no_grad(), undisturbed(device):
            full = step_function(graph, regions, policy, StepKind())(inputs, state, clock)
        with torch.no_grad(), undisturbed(device):
            original = step_function(graph, regions, Plain(config, regions), StepKind())(inputs, {}, clock)
        same_outputs("rewritten", full.outputs, original.outputs, config, record, inside)
        for capacity in (tokens, max(1, tokens // 2), 0):
            kind = StepKind(False, False, capacity, forced=capacity > 0)
            copies = {name: tensor.clone() for name, tensor in {**state, **full.updates}.items()}
            if capacity == tokens and config.family == "moeca":
                _spoil(copies)
            with torch.no_grad(), undisturbed(device):
                again = step_function(graph, regions, policy, kind)(inputs, copies, clock)
            check = "recomputed" if capacity else "reused"
            same_outputs(check, again.outputs, original.outputs, config, record, inside)
    except Exception as error:
        # Whatever stops a rewrite, the model itself still runs; the reason goes to the report.
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def undisturbed(device: torch.device) -> AbstractContextManager[Any]:
    """Random numbers drawn inside leave no trace: a trial draws what the model itself will draw after it."""
    context: AbstractContextManager[Any] = torch.random.fork_rng([device] if device.type == "cuda" else [])
    return context


def _spoil(state: dict[str, Tensor]) -> None:
    """Make cached activations useless, so that a step that should recompute all of them shows what it did not."""
    kept = (".index", ".place", ".weight", ".norms", ".activation", ".age", ".slope")
    for name, tensor in state.items():
        if not name.endswith(kept):
            tensor.fill_(float("nan"))


def _parts(regions: Regions) -> list[Attention | Experts | FeedForward]:
    return [*regions.attentions, *regions.experts, *regions.feedforwards]


def _alone(regions: Regions, part: Attention | Experts | FeedForward) -> Regions:
    return _only(regions, [part])


def _only(regions: Regions, parts: Sequence[Attention | Experts | FeedForward]) -> Regions:
    """The regions without all but `parts`; residual branches go with the region that they belong to."""
    attentions = tuple(a for a in regions.attentions if a in parts)
    experts = tuple(e for e in regions.experts if e in parts)
    feedforwards = tuple(f for f in regions.feedforwards if f in parts)
    outputs = {f.output for f in feedforwards}
    residuals = tuple(
        r
        for r in regions.residuals
        if r in {a.residual for a in attentions} | {e.residual for e in experts} or r.output in outputs
    )
    return replace(regions, attentions=attentions, experts=experts, feedforwards=feedforwards, residuals=residuals)


def _without(regions: Regions, faults: dict[Attention | Experts | FeedForward, str]) -> Regions:
    skipped = tuple(Skipped(type(part).__name__.lower(), part.name, why) for part, why in faults.items())
    good = [part for part in _parts(regions) if part not in faults]
    return replace(_only(regions, good), skipped=(*regions.skipped, *skipped))


def token_dtypes(regions: Regions) -> set[torch.dtype]:
    """The floating point types that tokens are computed in."""
    values = (node.meta["val"] for node in regions.layouts)
    return {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}


def same_outputs(
    check: str,
    found: Sequence[Any],
    wanted: Sequence[Any],
    config: MoecaConfig,
    record: Record | None,
    inside: Iterable[torch.dtype] = (),
) -> None:
    """Compare outputs and note the error; `inside` are the types that they were computed in, besides their own.

    Raises ValidationError where the error exceeds the tolerance.
    """
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            error = relative_error(one, other)
            allowed = config.tolerance or max(TOLERANCE.get(dtype, 1e-4) for dtype in (one.dtype, *inside))
            if record is not None:
                record.worst(check, error)
            if not error <= allowed:
                raise ValidationError(f"{check} step: error {error:.2e} exceeds {allowed:.0e}")


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Error of `found` relative to the scale of `wanted` (see TOLERANCE for which measure)."""
    difference, scale = (found - wanted).double(), wanted.double()
    if found.dtype in (torch.float32, torch.float64):
        return float(difference.abs().max() / scale.abs().max().clamp_min(1e-30))
    return float(difference.square().mean().sqrt() / scale.square().mean().sqrt().clamp_min(1e-30))
