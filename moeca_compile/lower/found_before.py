"""What earlier processes found out and kept on disk: traced steps, and that a validation passed.

A validation is kept only if it compared everything and found nothing: no region was skipped, nothing was constant, no
warning was given. Any other is made again by each process, and so is one whose key differs in anything: the graph
with its shapes, the options, the sources, torch, the machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from moeca_compile.config import MoecaConfig
from moeca_compile.disk import store
from moeca_compile.disk.form import NoFormError, described, graph_form, graph_of
from moeca_compile.disk.keys import digest, graph_key, inputs_form, weight_facts
from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.lower.program import CompiledStep, TracedStep
from moeca_compile.notes import Notes
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import StepKind

_log = logging.getLogger(__name__)

VALIDATION, STEP = "validation", "step"

T = TypeVar("T")


def validated(key: str | None, notes: Notes, validate: Callable[[], T], passed: T) -> T:
    """What `validate` returns; without calling it where it has returned `passed`, and noted nothing else, before.

    Args:
        key: of all that the outcome depends on; None to validate in any case.
        passed: what it returns where all is well.
    """
    known = store.read(VALIDATION, key) if key is not None else None
    if isinstance(known, dict) and all(isinstance(error, float) for error in known.values()):
        for check, error in known.items():
            notes.worst(check, error)
        notes.from_disk["validations"] += 1
        return passed
    with notes.watched() as outcome:
        found = validate()
    if key is not None and found == passed and not outcome.warned:
        store.write(VALIDATION, key, outcome.errors)
    return found


def rewrite_key(
    module: fx.GraphModule,
    regions: Regions,
    config: MoecaConfig,
    inputs: Sequence[Any],
    arguments: Sequence[bool],
    device: torch.device,
) -> str | None:
    """The key of a validation of the rewrite; None where there is none to keep."""
    if not (config.disk_cache and config.validate and config.policy.caches and regions.parts):
        return None
    try:
        key = graph_key(module, regions, config, device)
        return digest("rewrite", key, inputs_form(inputs), weight_facts(inputs, arguments))
    except NoFormError as error:
        _log.debug("the validation of the rewrite is not kept: %s", error)
        return None


def check_key(compiled: CompiledGraph, kind: StepKind, step: CompiledStep, inputs: Sequence[Any]) -> str | None:
    """The key of a validation of compiled code."""
    if not (compiled.config.disk_cache and compiled.config.validate):
        return None
    try:
        key = compiled.key or graph_key(compiled.module, compiled.regions, compiled.config, compiled.device)
        facts = weight_facts(inputs, compiled.captured.arguments)
        return digest("step", key, kind.name, graph_form(step.traced.graph), _partitions(step), facts)
    except NoFormError as error:
        _log.debug("the validation of %s steps is not kept: %s", kind.name, error)
        return None


def _partitions(step: CompiledStep) -> list[list[str]]:
    return [[node.name for node in call.nodes] for call, _ in step.partitions]


def step_key(
    compiled: CompiledGraph, kind: StepKind, inputs: Sequence[Any], state: Caches, weights: Tensor
) -> str | None:
    """The key of a traced step; None where it is not kept."""
    if compiled.key is None:
        return None
    try:
        cached = {name: described(value) for name, value in state.items()}
        given = [(i, value) for i, value in enumerate(inputs) if not isinstance(value, Tensor)]
        return digest(compiled.key, repr(kind), inputs_form(inputs), repr(given), cached, described(weights))
    except NoFormError as error:
        _log.debug("%s steps are not kept: %s", kind.name, error)
        return None


def traced_before(key: str | None, notes: Notes) -> TracedStep | None:
    """The step of a key, as an earlier process traced it; None where none did."""
    known = store.read(STEP, key) if key is not None else None
    if known is None:
        return None
    try:
        state, updates, outputs, constants, form = known
        step = TracedStep(
            graph_of(form), tuple(state), tuple(updates), int(outputs), constants=frozenset(map(int, constants))
        )
    except (NoFormError, TypeError, ValueError) as error:
        _log.debug("the traced step %s is ignored: %s", key, error)
        return None
    notes.from_disk["traced steps"] += 1
    return step


def keep_traced(key: str | None, step: TracedStep) -> None:
    """Keep a step as it was traced, before anything changes its graph."""
    if key is None:
        return
    try:
        form = graph_form(step.graph)
    except NoFormError as error:
        _log.debug("a traced step is not kept: %s", error)
        return
    known = [step.state_names, step.update_names, step.outputs, sorted(step.constants), form]
    store.write(STEP, key, known)
