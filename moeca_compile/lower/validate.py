"""Validation on the real first inputs: no rewritten graph is used before it has been compared with the original.

`sound_regions` checks the rewrite, before anything is compiled, and leaves out what fails. `same_outputs` checks what
lowering made of a graph, when a step is first used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.config import MoecaConfig
from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.notes import Notes, first_line
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.kinds import CacheSpec, Role, StepKind
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.passes.rewrite.step_function import StepFunction, StepResult, step_function

_log = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Greatest error that passes. For float32 and float64 it is the greatest difference over the greatest magnitude;
in lower precision a few routings flip by rounding, so there it is the root mean square of both. It goes by the
coarsest type that tokens are computed in: a model in float64 may have a router in float32."""


class ValidationError(RuntimeError):
    """A compiled step differs from what it stands for."""


def sound_regions(
    graph: fx.Graph, regions: Regions, config: MoecaConfig, inputs: Sequence[Any], notes: Notes
) -> Regions:
    """The regions whose rewrite is right on these inputs; the others are moved to `skipped` with the reason."""
    if not config.validate:
        return regions
    reason = _fault(graph, regions, config, inputs, notes)
    if reason is None:
        return regions
    each = {part: _fault(graph, regions.only([part]), config, inputs, None) for part in regions.parts}
    rest = regions.without({part: why for part, why in each.items() if why is not None})
    left = _fault(graph, rest, config, inputs, notes)
    if left is not None:
        notes.warn(
            f"the rewritten step differs from the model ({left}), so nothing is cached and the model runs as it was"
        )
        return replace(rest.without(dict.fromkeys(rest.parts, left)), residuals=())
    for skipped in rest.skipped[len(regions.skipped) :]:
        notes.warn(f"{skipped.kind} {skipped.name} is not cached and runs as it was: {skipped.reason}")
    return rest


def _fault(
    graph: fx.Graph, regions: Regions, config: MoecaConfig, inputs: Sequence[Any], notes: Notes | None
) -> str | None:
    """Why a full step, or a cache step with forced recomputation right after it, is not the model; else None.

    On the inputs of the full step it makes no difference what is recomputed: all tokens, half of them, or none.
    """
    main = regions.main
    replacements = tuple(config.policy.declare(config, regions)) if main is not None else ()
    if main is None or not replacements:
        return None
    specs = [spec for replacement in replacements for spec in replacement.specs]
    device = regions.residuals[0].stream.meta["val"].device
    state = {s.name: torch.zeros(s.shape, dtype=s.dtype, device=device) for s in specs}

    def run(used: Sequence[Replacement], kind: StepKind, state: dict[str, Tensor]) -> StepResult:
        with torch.no_grad(), undisturbed(device):
            return step_function(graph, regions, used, kind)(inputs, state, torch.zeros(2, 2, device=device))

    def compare(check: str, found: StepResult) -> None:
        same_outputs(check, found.outputs, original.outputs, config, notes, regions.token_dtypes)

    try:
        full, original = run(replacements, StepKind(), state), run((), StepKind(), {})
        compare("rewritten", full)
        recomputes = any(replacement.recomputes for replacement in replacements)
        for capacity in (main.tokens, max(1, main.tokens // 2), 0):
            copies = {name: tensor.clone() for name, tensor in {**state, **full.updates}.items()}
            if capacity == main.tokens and recomputes:
                _poison(copies, specs)
            again = run(replacements, StepKind(False, False, capacity, forced=capacity > 0), copies)
            compare("recomputed" if capacity else "reused", again)
    except Exception as error:
        # Whatever stops a rewrite, the model itself still runs; the reason goes to the report.
        _log.debug("the rewrite of %s failed", [part.name for part in regions.parts], exc_info=True)
        return first_line(error)
    return None


def same_step(
    compiled: CompiledGraph,
    kind: StepKind,
    step: StepFunction,
    inputs: Sequence[Any],
    state: dict[str, Tensor],
    coefficients: Tensor,
    notes: Notes,
) -> bool:
    """Whether a lowered step gives what the same step gives eagerly, on copies of the state."""
    if not compiled.config.validate:
        return True
    eager = run_eagerly(compiled, kind, inputs, state, coefficients)
    with undisturbed(compiled.device):
        lowered = step(inputs, {name: tensor.clone() for name, tensor in state.items()}, coefficients)
    try:
        check = "full" if kind.full else "cache"
        same_outputs(check, lowered.outputs, eager.outputs, compiled.config, notes, compiled.regions.token_dtypes)
    except ValidationError as error:
        notes.warn(f"Inductor's code for {kind.name} steps is wrong here ({error}), so they run op by op, slower")
        return False
    return True


def run_eagerly(
    compiled: CompiledGraph, kind: StepKind, inputs: Sequence[Any], state: dict[str, Tensor], coefficients: Tensor
) -> StepResult:
    """Run a step without compilation on copies of the state."""
    with torch.no_grad(), undisturbed(compiled.device):
        copies = {name: tensor.clone() for name, tensor in state.items()}
        return compiled.function(kind)(inputs, copies, coefficients)


def undisturbed(device: torch.device) -> AbstractContextManager[Any]:
    """Random numbers drawn inside leave no trace: a trial draws what the model itself will draw after it."""
    context: AbstractContextManager[Any] = torch.random.fork_rng([device] if device.type == "cuda" else [])
    return context


def _poison(state: dict[str, Tensor], specs: Sequence[CacheSpec]) -> None:
    """Make cached activations useless, so that a step that should recompute all of them shows what it did not."""
    for spec in specs:
        if spec.role is Role.ACTIVATION:
            state[spec.name].fill_(float("nan"))


def same_outputs(
    check: str,
    found: Sequence[Any],
    wanted: Sequence[Any],
    config: MoecaConfig,
    notes: Notes | None,
    inside: Iterable[torch.dtype] = (),
) -> None:
    """Compare outputs and note the error; `inside` are the types that they were computed in, besides their own.

    Raises ValidationError where the error exceeds the tolerance.
    """
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            error = relative_error(one, other)
            allowed = config.tolerance or max(TOLERANCE.get(dtype, 1e-4) for dtype in (one.dtype, *inside))
            if notes is not None:
                notes.worst(check, error)
            if not error <= allowed:
                raise ValidationError(f"{check} step: error {error:.2e} exceeds {allowed:.0e}")


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Error of `found` relative to the scale of `wanted` (see TOLERANCE for which measure)."""
    difference, scale = (found - wanted).double(), wanted.double()
    if found.dtype in (torch.float32, torch.float64):
        return float(difference.abs().max() / scale.abs().max().clamp_min(1e-30))
    return float(difference.square().mean().sqrt() / scale.square().mean().sqrt().clamp_min(1e-30))
