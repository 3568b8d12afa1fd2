"""A step as one function of inputs and caches, for each kind of step; tracing it gives the rewritten graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from moeca_compile.passes.analysis.graph import between
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.evaluate import Compute
from moeca_compile.passes.rewrite.kinds import PROBE, StepKind
from moeca_compile.passes.rewrite.layers import layer_output
from moeca_compile.passes.rewrite.probe import Probe
from moeca_compile.passes.rewrite.replacement import Cache, Replacement
from moeca_compile.passes.rewrite.step import Observer, Step


class StepResult(NamedTuple):
    """The model's outputs, new values of caches (as `Step.updates`), and the counters (layers, COUNTERS) or None."""

    outputs: tuple[Any, ...]
    updates: dict[str, Tensor]
    counts: Tensor | None


StepFunction = Callable[[Sequence[Any], dict[str, Tensor], Tensor], StepResult]
"""(inputs, state, forecast weights (2, K, K)) -> result. Some ops update state in place."""


def step_function(
    graph: fx.Graph,
    regions: Regions,
    replacements: Sequence[Replacement],
    kind: StepKind,
    updates: bool = True,
    probe: Probe | None = None,
    observer: Observer | None = None,
) -> StepFunction:
    """The step of this kind as an eager function. What a `probe` hands on, the caches have.

    Without `updates`, new values of caches are dropped after their last use, and the result has none: all of them are
    as large as the caches. An `observer` watches the step, which then must not be traced.
    """
    replacements = [each for each in replacements if each.filled_at(kind) or each.reused_at(kind)]
    reads: dict[fx.Node, Sequence[fx.Node]] = dict.fromkeys(regions.bodies, ())
    reads |= {each.node: _reads(each, kind) for each in replacements}
    stored = [node for each in replacements if each.filled_at(kind) for node in each.stored]
    handed_on = probe.names if probe is not None else {}
    reads |= dict.fromkeys(handed_on, ())
    if observer is not None:
        stored += [node for watched in observer.watched.values() for node in watched]

    def run(inputs: Sequence[Any], state: dict[str, Tensor], weights: Tensor) -> StepResult:
        computes: dict[fx.Node, Compute] = {}
        step = Step(graph, regions, kind, inputs, state, weights, computes, reads, stored)
        step.observer = observer
        computes |= {marker: partial(layer_output, step, marker) for marker in regions.bodies}
        for replacement in replacements:
            compute = replacement.reuse if replacement.reused_at(kind) else replacement.fresh
            if compute is not None:
                computes[replacement.node] = partial(compute, step)
        computes |= {node: partial(step.current, name) for node, name in handed_on.items()}
        try:
            return _result(step, replacements, updates)
        finally:  # what refers to the step would keep its values alive until Python looks for cycles
            computes.clear()
            step.memo.clear()

    return run


def probe_function(graph: fx.Graph, regions: Regions, probe: Probe) -> StepFunction:
    """The probe as an eager function, whose only output is its signal."""

    def run(inputs: Sequence[Any], state: dict[str, Tensor], weights: Tensor) -> StepResult:
        computes: dict[fx.Node, Compute] = {}
        step = Step(graph, regions, PROBE, inputs, state, weights, computes)
        computes |= {marker: partial(layer_output, step, marker) for marker in regions.bodies}
        try:
            return StepResult((probe.run(step),), step.updates, None)
        finally:
            computes.clear()
            step.memo.clear()

    return run


def _reads(replacement: Replacement, kind: StepKind) -> Sequence[fx.Node]:
    """The values that it may read for all tokens, besides those that its node's op is computed from."""
    if not (replacement.recomputes_rows and kind.capacity):
        return replacement.reads
    work = between(replacement.source, [replacement.node])
    return [*replacement.reads, *dict.fromkeys(arg for node in sorted(work) for arg in node.all_input_nodes)]


def _result(step: Step, replacements: Sequence[Replacement], updates: bool) -> StepResult:
    """Run the step, and fill the caches of the parts that it computes.

    Each is filled as soon as its values are there, which may be views of larger ones. In a traced step all are filled
    at its end: they would separate ops that Inductor fuses.
    """
    waiting: dict[fx.Node, list[Cache]] = {}
    read_last: dict[fx.Node, list[Cache]] = {}
    for replacement in replacements:
        for cache in replacement.caches:
            if replacement.filled_at(step.kind):
                waiting.setdefault(max(replacement.node, *cache.reads()), []).append(cache)
            elif not updates:
                read_last.setdefault(replacement.node, []).append(cache)

    observer = step.observer
    unseen = dict(observer.watched) if observer is not None else {}

    def show(node: fx.Node) -> None:
        if observer is not None:
            watched = unseen.pop(node, ())
            for each in watched:
                observer.see(each, step[each])
            step.values.release(watched)

    def fill(node: fx.Node) -> None:
        show(node)
        for cache in waiting.pop(node, ()):
            cache.store(step)
            step.values.release(cache.reads())
            if not updates:
                _drop_updates(step, cache)
        for cache in read_last.pop(node, ()):
            _drop_updates(step, cache)

    outputs = step.run(None if step.values.tracing else fill)
    for node in list(waiting):
        fill(node)
    for node in list(unseen):
        if node in step.values.values:  # a replacement asked for it
            show(node)
    counts = torch.stack(step.counts).to(torch.float32) if step.counts else None
    return StepResult(_apart(outputs, {**step.state, **step.updates}), step.updates if updates else {}, counts)


def _drop_updates(step: Step, cache: Cache) -> None:
    for spec in cache.specs():
        step.updates.pop(spec.ring, None)
        step.updates.pop(spec.name, None)


def _storage(tensor: Tensor) -> int:
    """An id of the memory of a tensor. Not its address, since fake tensors have none."""
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)


def _apart(outputs: Sequence[Any], caches: dict[str, Tensor]) -> tuple[Any, ...]:
    """The outputs, cloned where they share memory with a cache, which the user must not change in place."""
    cached = {_storage(tensor) for tensor in caches.values()}
    return tuple(
        value.clone() if isinstance(value, Tensor) and _storage(value) in cached else value for value in outputs
    )
