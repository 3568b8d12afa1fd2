"""Validation on the first real inputs: no rewritten graph is used before it has been compared with the original.

`sound_regions` checks the rewrite before anything is compiled, and skips regions that fail. `same_step` checks
Inductor's code when a step is first used.
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
from moeca_compile.notes import Notes
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import CacheSpec, Role, StepKind
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.passes.rewrite.step_function import StepFunction, StepResult, step_function
from moeca_compile.policies.forecast import weights_after_one
from moeca_compile.text import first_line

_log = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The largest relative error that passes, by dtype (see `relative_error`). The dtype is the least precise one that
tokens are computed in: a model in float64 may have a router in float32."""


class ValidationError(RuntimeError):
    """A rewritten or compiled step differs from the original."""


def sound_regions(
    graph: fx.Graph, regions: Regions, config: MoecaConfig, inputs: Sequence[Any], notes: Notes
) -> Regions:
    """Validate the rewrite on these inputs; regions whose rewrite is wrong move to `skipped`, with the reason.

    All regions are checked together first. Only if that fails, each is checked alone.
    """
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
            f"the rewritten step differs from the model ({left}). Nothing is cached, and the model runs as under "
            "plain torch.compile. docs/debugging.md helps find the cause"
        )
        return replace(rest.without(dict.fromkeys(rest.parts, left)), residuals=())
    for skipped in rest.skipped[len(regions.skipped) :]:
        notes.warn(
            f"the rewrite of {skipped.kind} {skipped.name} failed validation ({skipped.reason}). It is not cached "
            "and runs at every step. docs/debugging.md helps find the cause"
        )
    return rest


def _fault(
    graph: fx.Graph, regions: Regions, config: MoecaConfig, inputs: Sequence[Any], notes: Notes | None
) -> str | None:
    """What is wrong with the rewrite of these regions, None where nothing is."""
    try:
        _check_rewrite(graph, regions, config, inputs, notes)
    except Exception as error:
        # Whatever a rewrite raises, the model itself still runs; the reason goes to the report.
        _log.debug("the rewrite of %s failed", [part.name for part in regions.parts], exc_info=True)
        return first_line(error)
    return None


def _check_rewrite(
    graph: fx.Graph, regions: Regions, config: MoecaConfig, inputs: Sequence[Any], notes: Notes | None
) -> None:
    """Compare a full step, and cache steps right after it, with the model.

    The cache steps run on the inputs of the full step. So they must give the same outputs whether they recompute all
    tokens, half of them, or none. Raises ValidationError at the first difference.
    """
    main = regions.main
    replacements = tuple(config.policy.declare(config, regions)) if main is not None else ()
    if main is None or not replacements:
        return
    specs = [spec for replacement in replacements for spec in replacement.specs]
    device, dtypes = regions.residuals[0].stream.meta["val"].device, regions.token_dtypes
    state, weights = Caches(specs, device), weights_after_one(device)

    def run(used: Sequence[Replacement], kind: StepKind, state: dict[str, Tensor]) -> StepResult:
        with torch.no_grad(), undisturbed(device):
            return step_function(graph, regions, used, kind)(inputs, state, weights)

    full, original = run(replacements, StepKind(), state), run((), StepKind(), {})
    state.store(full.updates)
    same_outputs("rewritten", full.outputs, original.outputs, config, notes, dtypes)
    recomputes = any(replacement.recomputes for replacement in replacements)
    for capacity in (main.tokens, max(1, main.tokens // 2), 0):
        copies = state.cloned()
        if capacity == main.tokens and recomputes:
            _poison(copies, specs)
        again = run(replacements, StepKind(False, False, capacity, forced=capacity > 0), copies)
        check = "recomputed" if capacity else "reused"
        same_outputs(check, again.outputs, original.outputs, config, notes, dtypes)


def same_step(
    compiled: CompiledGraph,
    kind: StepKind,
    step: StepFunction,
    inputs: Sequence[Any],
    state: Caches,
    weights: Tensor,
    notes: Notes,
) -> bool:
    """Whether a compiled step equals the same step in eager mode, both on copies of the caches."""
    if not compiled.config.validate:
        return True
    eager = run_eagerly(compiled, kind, inputs, state, weights)
    with undisturbed(compiled.device):
        lowered = step(inputs, state.cloned(), weights)
    try:
        check = "full" if kind.full else "cache"
        same_outputs(check, lowered.outputs, eager.outputs, compiled.config, notes, compiled.regions.token_dtypes)
    except ValidationError as error:
        notes.warn(
            f"Inductor's code for {kind.name} steps gives other values than eager mode ({error}), so they run op by "
            "op, which is slower. Try another version of torch, and please report it"
        )
        return False
    return True


def run_eagerly(
    compiled: CompiledGraph, kind: StepKind, inputs: Sequence[Any], state: Caches, weights: Tensor
) -> StepResult:
    """Run a step in eager mode on copies of the caches."""
    with torch.no_grad(), undisturbed(compiled.device):
        return compiled.function(kind)(inputs, state.cloned(), weights)


def undisturbed(device: torch.device) -> AbstractContextManager[Any]:
    """Restore the random number generators afterwards, so that a trial run does not change the model's numbers."""
    context: AbstractContextManager[Any] = torch.random.fork_rng([device] if device.type == "cuda" else [])
    return context


def _poison(state: dict[str, Tensor], specs: Sequence[CacheSpec]) -> None:
    """Fill cached activations with NaN, so that a step that should recompute all of them fails if it reads one."""
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
    """Compare outputs, and note the error under the name of the `check`.

    `inside` are dtypes that the outputs were computed in, besides their own. Raises ValidationError where the error
    exceeds the tolerance.
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
    """Error of `found` relative to the scale of `wanted`.

    In float32 and float64: the largest difference over the largest magnitude. In lower precision rounding flips a few
    routings, so there it is the root mean square of the difference over that of `wanted`.
    """
    difference, scale = (found - wanted).double(), wanted.double()
    if found.dtype in (torch.float32, torch.float64):
        return float(difference.abs().max() / scale.abs().max().clamp_min(1e-30))
    return float(difference.square().mean().sqrt() / scale.square().mean().sqrt().clamp_min(1e-30))
