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
from moeca_compile.disk.form import computation, described, graph_form, graph_of
from moeca_compile.disk.keys import RewriteFacts, captured_key, digest, environment, inputs_form, weight_facts
from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.lower.program import CompiledStep, PartedStep, TracedStep
from moeca_compile.notes import Notes
from moeca_compile.passes.export import to_functional_aten
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.text import first_line

_log = logging.getLogger(__name__)

VALIDATION, STEP, EXPORT = "validation", "step", "export"

T = TypeVar("T")


def keeps(config: MoecaConfig) -> bool:
    """Whether anything is kept. A dump shows how everything comes about."""
    return config.disk_cache and config.dump is None and store.folder() is not None


def _or_none(what: str, make: Callable[[], T]) -> T | None:
    """What `make` returns; None where it fails in any way: no compilation may fail for what could be kept."""
    try:
        return make()
    except Exception as error:
        _log.debug("%s is not kept, or not used from disk: %s", what, first_line(error))
        return None


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
        _or_none("a validation", lambda: store.write(VALIDATION, key, outcome.errors))
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
    if export is not to_functional_aten or not keeps(config):
        return export(gm, inputs)
    what = "the exported graph"
    key = _or_none(what, lambda: captured_key(gm, inputs, device))
    known = store.read(EXPORT, key) if key is not None else None
    before = _or_none(what, lambda: _exported_graph(known)) if known is not None else None
    if before is not None:
        notes.from_disk["exported graphs"] += 1
        return before
    found = export(gm, inputs)
    if key is not None:
        _or_none(what, lambda: store.write(EXPORT, key, [found.meta["mutated_inputs"], graph_form(found)]))
    return found


def _exported_graph(known: Any) -> fx.GraphModule:
    mutated, form = known
    found = graph_of(form)
    found.meta["mutated_inputs"] = tuple(map(int, mutated))
    return found


def rewrite_key(
    facts: RewriteFacts | None, config: MoecaConfig, inputs: Sequence[Any], device: torch.device
) -> str | None:
    """The key of a validation of the rewrite; None where there is none to keep."""
    if facts is None or not keeps(config):
        return None

    def key() -> str:
        graph = digest(environment(device), *facts.graph)
        return digest("rewrite", graph, inputs_form(inputs), facts.weights)

    return _or_none("the validation of the rewrite", key)


def check_key(
    compiled: CompiledGraph, kind: StepKind, step: PartedStep, inputs: Sequence[Any], code: CompiledStep | None = None
) -> str | None:
    """The key of a validation of compiled code; without the code, that of code for its own sizes."""
    if not (keeps(compiled.config) and compiled.config.validate):
        return None

    def key() -> str:
        facts = weight_facts(inputs, compiled.captured.arguments)
        traced = computation(graph_form(step.traced.graph))
        codes = [each for _, each in code.partitions] if code is not None else [None for _ in step.calls]
        varying = [compiled.captured.parts.for_all_sizes(each) for each in codes]
        return digest("step", compiled.key, kind.name, traced, _partitions(step), varying, facts)

    return _or_none(f"the validation of {kind.name} steps", key)


def _partitions(step: PartedStep) -> list[list[int]]:
    number = {node: i for i, node in enumerate(step.traced.graph.graph.nodes)}
    return [[number[node] for node in call.nodes] for call in step.calls]


def was_validated(key: str | None) -> bool:
    """Whether an earlier process has validated what this is the key of."""
    return key is not None and store.read(VALIDATION, key) is not None


def step_key(
    compiled: CompiledGraph, kind: StepKind, inputs: Sequence[Any], state: Caches, weights: Tensor
) -> str | None:
    """The key of a traced step; None where it is not kept."""
    if not keeps(compiled.config) or compiled.recorded:  # how recorded steps write depends on what shares memory
        return None

    def key() -> str:
        cached = {name: described(value) for name, value in state.items()}
        known = compiled.key, compiled.caching, repr(kind)
        return digest(*known, inputs_form(inputs), cached, described(weights))

    return _or_none(f"the traced {kind.name} step", key)


def traced_before(key: str | None, notes: Notes) -> TracedStep | None:
    """The step of a key, as an earlier process traced it; None where none did."""
    known = store.read(STEP, key) if key is not None else None
    step = _or_none("a traced step", lambda: _traced_step(known)) if known is not None else None
    if step is not None:
        notes.from_disk["traced steps"] += 1
    return step


def _traced_step(known: Any) -> TracedStep:
    state, updates, outputs, constants, form = known
    positions = frozenset(map(int, constants))
    return TracedStep(graph_of(form), tuple(state), tuple(updates), int(outputs), constants=positions)


def keep_traced(key: str | None, step: TracedStep) -> None:
    """Keep a step as it was traced, before anything changes its graph."""
    if key is None:
        return

    def keep() -> None:
        known = [step.state_names, step.update_names, step.outputs, sorted(step.constants), graph_form(step.graph)]
        store.write(STEP, key, known)

    _or_none("a traced step", keep)
