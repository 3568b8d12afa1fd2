"""What earlier processes found out and kept on disk: exported graphs, traced steps, and that a validation passed.

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
from moeca_compile.disk.form import NoFormError, computation, described, graph_form, graph_of
from moeca_compile.disk.keys import captured_key, digest, graph_key, inputs_form, weight_facts
from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.lower.program import CompiledStep, TracedStep
from moeca_compile.notes import Notes
from moeca_compile.passes.export import to_functional_aten
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import StepKind

_log = logging.getLogger(__name__)

VALIDATION, STEP, EXPORT = "validation", "step", "export"

T = TypeVar("T")


def _keeps(config: MoecaConfig) -> bool:
    """Whether anything is kept. A dump shows how everything comes about."""
    return config.disk_cache and config.dump is None and store.folder() is not None


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


def exported(
    export: Callable[[fx.GraphModule, Sequence[Any]], fx.GraphModule],
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: MoecaConfig,
    device: torch.device,
    notes: Notes,
) -> fx.GraphModule:
    """What `export` returns for Dynamo's graph; without calling it where an earlier process did for an equal one."""
    if export is not to_functional_aten or not _keeps(config):
        return export(gm, inputs)
    try:
        key = captured_key(gm, inputs, device)
    except NoFormError as error:
        _log.debug("the exported graph is not kept: %s", error)
        return export(gm, inputs)
    known = _exported_before(key)
    if known is not None:
        notes.from_disk["exported graphs"] += 1
        return known
    found = export(gm, inputs)
    try:
        store.write(EXPORT, key, [found.meta["mutated_inputs"], graph_form(found)])
    except NoFormError as error:
        _log.debug("the exported graph is not kept: %s", error)
    return found


def _exported_before(key: str) -> fx.GraphModule | None:
    known = store.read(EXPORT, key)
    if known is None:
        return None
    try:
        mutated, form = known
        found = graph_of(form)
        found.meta["mutated_inputs"] = tuple(map(int, mutated))
        return found
    except (NoFormError, TypeError, ValueError) as error:
        _log.debug("the exported graph %s is ignored: %s", key, error)
        return None


def rewrite_key(
    module: fx.GraphModule,
    regions: Regions,
    config: MoecaConfig,
    inputs: Sequence[Any],
    arguments: Sequence[bool],
    device: torch.device,
) -> str | None:
    """The key of a validation of the rewrite; None where there is none to keep."""
    if not (_keeps(config) and config.validate and config.policy.caches and regions.parts):
        return None
    try:
        key = graph_key(module, regions, config, device)
        return digest("rewrite", key, inputs_form(inputs), weight_facts(inputs, arguments))
    except NoFormError as error:
        _log.debug("the validation of the rewrite is not kept: %s", error)
        return None


def check_key(compiled: CompiledGraph, kind: StepKind, step: CompiledStep, inputs: Sequence[Any]) -> str | None:
    """The key of a validation of compiled code."""
    if not (_keeps(compiled.config) and compiled.config.validate):
        return None
    try:
        facts = weight_facts(inputs, compiled.captured.arguments)
        traced = computation(graph_form(step.traced.graph))
        return digest("step", compiled.key, kind.name, traced, _partitions(step), facts)
    except NoFormError as error:
        _log.debug("the validation of %s steps is not kept: %s", kind.name, error)
        return None


def _partitions(step: CompiledStep) -> list[list[int]]:
    number = {node: i for i, node in enumerate(step.traced.graph.graph.nodes)}
    return [[number[node] for node in call.nodes] for call, _ in step.partitions]


def step_key(
    compiled: CompiledGraph, kind: StepKind, inputs: Sequence[Any], state: Caches, weights: Tensor
) -> str | None:
    """The key of a traced step; None where it is not kept."""
    if not _keeps(compiled.config) or compiled.recorded:  # how recorded steps write depends on what shares memory
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
