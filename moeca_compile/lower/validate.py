"""Validation on the first real inputs: nothing is used before it has been compared with the original.

`sound_regions` checks the rewrite before anything is compiled, and leaves out the regions that fail. `same_step`
checks Inductor's code when a kind of step is first used.

Both look at one part at a time, on exact inputs: the value that replaces a region's output is computed from the
model's own values, and a partition of a step gets the inputs that it has in eager mode. So errors do not pile up over
the blocks, a fault is found where it begins, and what rounding may do is known part by part (lower.rounding).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.config import MoecaConfig
from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.lower.partition_check import checked_outputs, noisy_outputs
from moeca_compile.lower.program import CompiledStep
from moeca_compile.lower.random_state import undisturbed
from moeca_compile.lower.rounding import Trial, ValidationError, allowed_error, compare
from moeca_compile.lower.teacher import Teacher
from moeca_compile.notes import Notes
from moeca_compile.passes.match.regions import Attention, Experts, FeedForward, Regions, Residual
from moeca_compile.passes.rewrite.caches import Caches, Untouched
from moeca_compile.passes.rewrite.kinds import REUSING, Role, StepKind
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.passes.rewrite.step import Observer, Step
from moeca_compile.passes.rewrite.step_function import StepResult, probe_function, step_function
from moeca_compile.plan import cache_specs, probe_of, replacements_of
from moeca_compile.policies.forecast import rule_of, weights_after_one
from moeca_compile.text import first_line

_log = logging.getLogger(__name__)

Region = Attention | Experts | FeedForward
NOT_FINITE = "the model's first outputs were not finite, so the rewrite could not be validated yet"
CONSTANT = (
    "on the inputs for validation {0} had the same value for all tokens, as with gates or projections that are zero, "
    "or a router that takes no token. So nothing shows whether caching is right there. It is validated once the "
    "weights have changed: load them before the first call"
)


class NotFiniteError(RuntimeError):
    """The model's outputs have infinities or NaNs, which no comparison can tell from a fault."""


Faults = dict[Region | None, str]
"""What is wrong, by region; under None what belongs to no region alone."""


def sound_regions(
    graph: fx.Graph, regions: Regions, config: MoecaConfig, inputs: Sequence[Any], notes: Notes
) -> Regions:
    """Validate the rewrite on these inputs; regions whose rewrite is wrong move to `skipped`, with the reason."""
    if not config.validate:
        return regions
    left, constant = regions, dict[str, None]()
    try:
        while faults := _faults(graph, left, config, inputs, notes, constant):
            if None in faults or not left.parts:
                return _nothing_cached(regions, faults, notes)
            left = left.without(_first(faults))
    except NotFiniteError:
        return replace(regions.without(dict.fromkeys(regions.parts, NOT_FINITE)), residuals=(), finite=False)
    for skipped in left.skipped[len(regions.skipped) :]:
        notes.warn(
            f"the rewrite of {skipped.kind} {skipped.name} failed validation ({skipped.reason}). It is not cached "
            "and runs at every step. docs/debugging.md helps find the cause"
        )
    gone = {skipped.name for skipped in left.skipped}
    unproven = tuple(name for name in constant if name not in gone)
    if unproven:
        more = f" and {len(unproven) - 3} more" if len(unproven) > 3 else ""
        notes.warn(CONSTANT.format(", ".join(unproven[:3]) + more))
    return replace(left, unproven=unproven)


def _first(faults: Faults) -> dict[Region, str]:
    """The faults that do not follow from others: a router is probed on the cached output of an attention."""
    return {
        region: reason
        for region, reason in faults.items()
        if region is not None and not (isinstance(region, Experts) and region.probe in faults)
    }


def _nothing_cached(regions: Regions, faults: Faults, notes: Notes) -> Regions:
    reason = faults.get(None) or next(iter(faults.values()))
    notes.warn(
        f"the rewritten step differs from the model ({reason}). Nothing is cached, and the model runs as under "
        "plain torch.compile. docs/debugging.md helps find the cause"
    )
    return replace(regions.without(dict.fromkeys(regions.parts, reason)), residuals=())


# --- the rewrite ---------------------------------------------------------------------------------------------------


def _faults(
    graph: fx.Graph,
    regions: Regions,
    config: MoecaConfig,
    inputs: Sequence[Any],
    notes: Notes,
    constant: dict[str, None],
) -> Faults:
    """Compare the rewritten steps with the model: a full step, and cache steps right after it on its inputs.

    Such cache steps must give the model's values whether they recompute all tokens, half of them, or none. Names of
    what has the same value for all tokens are added to `constant`.

    Raises NotFiniteError where the model's outputs are not finite.
    """
    replacements = replacements_of(config, regions)
    if regions.main is None or not replacements:
        return {}
    device = regions.residuals[0].stream.meta["val"].device
    with torch.no_grad(), undisturbed(device):
        try:
            probe = probe_of(config, regions, replacements)
            caches = Caches(cache_specs(replacements, probe), device)
            weights = weights_after_one(rule_of(config).slots, device)
            with undisturbed(device):
                if probe is not None:
                    caches.store(probe_function(graph, regions, probe)(inputs, caches, weights).updates)
                step = step_function(graph, regions, replacements, StepKind(), probe=probe)
                full = step(inputs, caches, weights)
            if not all_finite(full.outputs):
                _raise_unless_finite(graph, regions, inputs, Caches((), device), weights)
            caches.store(full.updates)
            check = _Check(regions, config, notes, caches, constant)
            teacher = Teacher(graph, regions, replacements, inputs, weights, check)
            return check.faults(teacher, full.outputs)
        except NotFiniteError:
            raise
        except Exception as error:
            _log.debug("the rewrite of %s failed", [part.name for part in regions.parts], exc_info=True)
            reason = first_line(error)
    return _faults_alone(graph, regions, config, inputs, notes) or {None: reason}


def all_finite(values: Iterable[Any]) -> bool:
    """Whether no tensor among these has infinities or NaNs. On an accelerator the host waits for the device."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _raise_unless_finite(
    graph: fx.Graph, regions: Regions, inputs: Sequence[Any], caches: Caches, weights: Tensor
) -> None:
    """Ask the unchanged model: a rewrite that is wrong may give a NaN as well."""
    with undisturbed(weights.device):
        outputs = step_function(graph, regions, (), StepKind())(inputs, caches, weights).outputs
    if not all_finite(outputs):
        raise NotFiniteError(NOT_FINITE)


def _faults_alone(
    graph: fx.Graph, regions: Regions, config: MoecaConfig, inputs: Sequence[Any], notes: Notes
) -> Faults:
    """The faults of regions that cannot be cached even where no other region is."""
    if len(regions.parts) < 2:
        return {}
    alone = {part: _faults(graph, regions.only([part]), config, inputs, notes, {}) for part in regions.parts}
    return {part: next(iter(faults.values())) for part, faults in alone.items() if faults}


class _Check:
    """Compares what replaces values of the model with these values, one by one."""

    def __init__(
        self, regions: Regions, config: MoecaConfig, notes: Notes, caches: Caches, constant: dict[str, None]
    ) -> None:
        self.regions, self.config, self.notes, self.caches = regions, config, notes, caches
        self.constant = constant
        self.names = {node: region.name for node, region in _region_of(regions).items()}
        self.names |= {layer.residual.output: layer.name for layer in regions.experts}
        self.region_of, self.found = _region_of(regions), Faults()
        self.steps: list[tuple[str, Step]] = []

    def faults(self, teacher: Teacher, full: Sequence[Any]) -> Faults:
        """What is wrong with the replaced values, or with the outputs of the `full` step."""
        self.steps, device = self._cache_steps(teacher), self.caches.device
        teacher.watched = {residual.add: partial(self._see_sum, residual) for residual in self.regions.residuals}
        with undisturbed(device):
            wanted = teacher.outputs()
        if not any(map(_varies, wanted)):
            self.constant["the model's output"] = None
        if not self.found:
            self._compare("rewritten", full, wanted, (), undisturbed(device)(teacher.noisy_outputs))
        return self.found

    def __call__(self, teacher: Teacher, replacement: Replacement, wanted: Any) -> None:
        """Compare what replaces a value, by each cache step."""
        dtypes = [spec.dtype for spec in replacement.specs]
        try:
            if _is_constant(wanted) or _is_change_constant(wanted, teacher.step[replacement.source]):
                self.constant[self.names.get(replacement.node, replacement.specs[0].name)] = None
            for name, step in self.steps:
                self._compare(name, [replacement.reuse(step)], [wanted], dtypes, teacher.noisy(replacement))
        except Exception as error:  # whatever a rewrite raises, the model itself still runs
            _log.debug("the rewrite of %s failed", replacement.node, exc_info=True)
            self.found[self.region_of.get(replacement.node)] = first_line(error)
        for spec in replacement.specs:  # nothing reads them any more
            for _, step in self.steps:
                step.updates.pop(spec.name, None)

    def _see_sum(self, residual: Residual, teacher: Teacher, value: Any) -> None:
        """A residual branch that is added to the stream, after its gate."""
        if _is_change_constant(value, teacher.step[residual.stream]):
            self.constant[self.names.get(residual.output, residual.output.name)] = None

    def _cache_steps(self, teacher: Teacher) -> list[tuple[str, Step]]:
        """Cache steps on the inputs of the full step, with the name of the check."""
        copies, tokens = Untouched(self.caches), self.regions.main.tokens  # type: ignore[union-attr]
        found = [("reused", teacher.taught(REUSING, copies))]
        if any(replacement.recomputes for replacement in teacher.replacements.values()):
            held = {spec.name for r in teacher.replacements.values() if r.always_cached for spec in r.specs}
            roles = {name: spec.role for name, spec in self.caches.specs.items()}
            activations = {name for name, role in roles.items() if role is Role.ACTIVATION} - held
            # A step that recomputes everything must not read what was cached.
            states = {tokens: Untouched(self.caches, activations)}
            for capacity, state in (states | {max(1, tokens // 2): copies}).items():
                kind = StepKind(False, False, capacity, forced=True)
                found.append(("recomputed", teacher.taught(kind, state)))
        return found

    def _compare(
        self, check: str, found: Sequence[Any], wanted: Sequence[Any], dtypes: Iterable[torch.dtype], trial: Trial
    ) -> None:
        used = {*dtypes, *self.regions.token_dtypes}
        same_values(check, found, wanted, used, self.config, self.notes, trial)


def _is_constant(value: Any) -> bool:
    """Whether a value (..., tokens, features) is the same for all tokens."""
    if not isinstance(value, Tensor) or value.ndim < 2 or not value.is_floating_point() or not value.numel():
        return False
    first = value[..., :1, :]
    return bool((value == first).all()) and (value.shape[-2] > 1 or not first.any())


def _varies(output: Any) -> bool:
    """Whether an output of the model has different values."""
    return isinstance(output, Tensor) and bool((output != output.reshape(-1)[:1]).any())


def _is_change_constant(value: Any, before: Any) -> bool:
    """Whether a stream is what it was before, or all its tokens have changed by the same."""
    both = isinstance(value, Tensor) and isinstance(before, Tensor) and value.shape == before.shape
    return both and _is_constant(value - before)


def _region_of(regions: Regions) -> dict[fx.Node, Region]:
    """The region that each replaced node belongs to; shared experts belong to their layer."""
    found: dict[fx.Node, Region] = {attention.residual.output: attention for attention in regions.attentions}
    found |= {feedforward.output: feedforward for feedforward in regions.feedforwards}
    found = {layer.residual.output: layer for layer in regions.experts} | found
    found |= {node: e for e in regions.experts for node in (e.marker, *(shared.output for shared in e.shared))}
    return found


# --- compiled steps ------------------------------------------------------------------------------------------------


def same_step(
    compiled: CompiledGraph,
    kind: StepKind,
    step: CompiledStep,
    inputs: Sequence[Any],
    state: Caches,
    weights: Tensor,
    notes: Notes,
) -> bool:
    """Whether a compiled step equals the same step in eager mode. The caches do not change."""
    if not compiled.config.validate:
        return True
    check, config = "full" if kind.full else "probe" if kind.probe else "cache", compiled.config
    dtypes = {*compiled.regions.token_dtypes, *(spec.dtype for spec in compiled.plan.caches)}
    flat = step.traced.inputs(inputs, state, weights)

    def same(found: Sequence[Any], wanted: Sequence[Any], trial: Trial) -> None:
        same_values(check, found, wanted, dtypes, config, notes, trial)

    with torch.no_grad():
        try:
            with undisturbed(compiled.device):
                outputs = checked_outputs(step, flat, compiled.device, same)
            eager = run_eagerly(compiled, kind, inputs, state, weights, updates=False)
            same(eager.outputs, outputs, undisturbed(compiled.device)(partial(noisy_outputs, step, flat)))
        except ValidationError as error:
            notes.warn(
                f"Inductor's code for {kind.name} steps gives other values than eager mode ({error}), so they run op "
                "by op, which is slower. Try another version of torch, and please report it"
            )
            return False
    return True


def run_eagerly(
    compiled: CompiledGraph,
    kind: StepKind,
    inputs: Sequence[Any],
    state: Caches,
    weights: Tensor,
    updates: bool = True,
    observer: Observer | None = None,
) -> StepResult:
    """Run a step in eager mode. The caches do not change; their new values are returned if `updates` says so."""
    with torch.no_grad(), undisturbed(compiled.device):
        return compiled.function(kind, updates, observer)(inputs, Untouched(state), weights)


def same_values(
    check: str,
    found: Sequence[Any],
    wanted: Sequence[Any],
    dtypes: Iterable[torch.dtype],
    config: MoecaConfig,
    notes: Notes,
    trial: Trial | None = None,
    spared: float = 0.0,
) -> None:
    """Compare values, and note the error under the name of the `check`.

    Args:
        dtypes: what the values were computed in, besides their own dtypes.
        trial: computes `wanted` with noise (rounding.compare). The option `tolerance` takes its place.
        spared: the share of rows that may differ in any case.

    Raises ValidationError where they differ by more than rounding, or than the option `tolerance`.
    """
    tensors = [value for value in wanted if isinstance(value, Tensor)]
    if not tensors:
        return
    own = {tensor.dtype for tensor in tensors}
    allowed = config.tolerance or allowed_error({*own, *dtypes}, tensors[0].device)
    result = compare(found, wanted, allowed, None if config.tolerance else trial, spared)
    notes.worst(check, result.error)
    if result.unstable:
        notes.warn(
            f"rounding alone moves values of this model by {result.noise:.0%} ({check} steps, "
            f"{_names(own | {*dtypes})}), so validation could not tell a fault from it there. Compare the images "
            'with those of recipe="none", or run the model in float32 once'
        )


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
