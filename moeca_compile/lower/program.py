"""A step as compiled code: its function is traced to one graph, and that is compiled by Inductor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile._torch_private import fake_mode_of, joined_kernels, same_keys_everywhere, trace_to_graph
from moeca_compile.disk.keys import source_digest
from moeca_compile.lower.executor import Compiled, PartitionedExecutor
from moeca_compile.lower.fuse_routers import fuse_routers
from moeca_compile.lower.fuse_selections import fuse_selections
from moeca_compile.lower.multiply_before_widening import multiply_before_widening
from moeca_compile.lower.partition import Call, Subgraph, partition_graph, whole_graph
from moeca_compile.lower.parts import Part, Parts
from moeca_compile.ops.linear import use_fast_linears
from moeca_compile.passes.analysis.flops import StepFlops, step_flops
from moeca_compile.passes.analysis.graph import draws_random_numbers, placeholders
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.step_function import StepFunction, StepResult

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TracedStep:
    """A step as a graph of (tensor inputs..., caches..., weights, written...) -> [outputs..., updates..., counts].

    Attributes:
        graph: its inputs and outputs are flat lists of tensors.
        state_names: names of the caches that the graph reads or changes, in the order of its inputs.
        update_names: names of the caches that the graph returns new, in the order of its outputs.
        outputs: number of the model's outputs.
        written_names: names of the caches whose new values it writes into tensors that it is given (lower.in_place).
    """

    graph: fx.GraphModule
    state_names: tuple[str, ...]
    update_names: tuple[str, ...]
    outputs: int
    written_names: tuple[str, ...] = ()
    constants: frozenset[int] = frozenset()
    """Positions of the model's inputs that are no tensors: they are in the graph, and not among its inputs."""

    @property
    def changed(self) -> tuple[str, ...]:
        """The caches that get new values, whoever writes them."""
        return (*self.update_names, *self.written_names)

    def inputs(self, inputs: Sequence[Any], state: Mapping[str, Tensor], weights: Tensor) -> list[Tensor]:
        """The graph's inputs, from those of the step."""
        if self.constants:
            inputs = [value for i, value in enumerate(inputs) if i not in self.constants]
        read = [state[name] for name in self.state_names]
        return [*inputs, *read, weights, *[state[name] for name in self.written_names]]

    @property
    def cache_nodes(self) -> set[fx.Node]:
        """The graph's inputs for caches, those that it reads and those that it writes."""
        found = placeholders(self.graph.graph)
        weights = len(found) - 1 - len(self.written_names)
        return {*found[weights - len(self.state_names) : weights], *found[weights + 1 :]}

    def result(self, values: Sequence[Any]) -> StepResult:
        """The step's result from the graph's outputs."""
        end = self.outputs + len(self.update_names)
        updates = dict(zip(self.update_names, values[self.outputs : end], strict=True))
        return StepResult(tuple(values[: self.outputs]), updates, values[end] if len(values) > end else None)

    @property
    def output_nodes(self) -> list[Any]:
        """What gives the model's outputs."""
        *_, returned = self.graph.graph.nodes
        return list(returned.args[0][: self.outputs])

    @property
    def lifted(self) -> dict[fx.Node, Any]:
        """The values of the tensors that tracing lifted into the graph."""
        return {n: getattr(self.graph, str(n.target)) for n in self.graph.graph.nodes if n.op == "get_attr"}

    @cached_property
    def flops(self) -> StepFlops:
        """The floating-point operations of the step, counted on its graph."""
        return step_flops(self.graph.graph)


@dataclass(frozen=True)
class CompiledStep:
    """A compiled step.

    Some caches are changed in place by ops. The others are returned as new tensors in the result's `updates`, and the
    caller uses these in place of the old ones, without a copy. A step that is recorded as a CUDA graph writes what it
    can into the caches at hand instead, and returns the rest.
    """

    traced: TracedStep
    code: Callable[..., Sequence[Any]]
    partitions: tuple[tuple[Call, Compiled], ...] = ()
    """The calls that `code` makes, with the compiled code of each."""

    def __call__(self, inputs: Sequence[Any], state: dict[str, Tensor], weights: Tensor) -> StepResult:
        return self.traced.result(self.code(*self.traced.inputs(inputs, state, weights)))


def trace_step(function: StepFunction, inputs: Sequence[Any], state: Caches, weights: Tensor) -> TracedStep:
    """Trace a step to one graph, for inputs of these shapes. Caches that are not allocated yet stay so."""
    names, constants = tuple(state.specs), {i: v for i, v in enumerate(inputs) if not isinstance(v, Tensor)}
    found: dict[str, Any] = {}

    def flat_function(*arguments: Tensor) -> list[Tensor]:
        *tensors, weights = arguments
        given = tensors[: len(tensors) - len(names)]
        cached = dict(zip(names, tensors[len(given) :], strict=True))
        result = function(list(_with_constants(given, constants)), cached, weights)
        found["updates"], found["outputs"] = tuple(sorted(result.updates)), len(result.outputs)
        counts = [] if result.counts is None else [result.counts]
        return [*result.outputs, *(result.updates[name] for name in found["updates"]), *counts]

    with torch.no_grad():
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        graph = trace_to_graph(flat_function, *tensors, *_examples(state, inputs), weights)
    read = _without_unread_caches(graph, names)
    return TracedStep(graph, read, found["updates"], found["outputs"], constants=frozenset(constants))


def _examples(state: Caches, inputs: Sequence[Any]) -> list[Tensor]:
    """A tensor for each cache; one that is not allocated yet is fake."""
    with fake_mode_of([*inputs, *state.values()]):
        return [
            torch.empty(spec.shape, dtype=spec.dtype, device=state.device) if name not in state else state[name]
            for name, spec in state.specs.items()
        ]


def _cache_key_tag() -> str:
    """The user's tag, with a hash of our ops: Inductor's keys have their names alone, not what they do."""
    return f"{torch.compiler.config.cache_key_tag} moeca_compile ops {source_digest('ops')}".strip()


def _without_unread_caches(gm: fx.GraphModule, names: Sequence[str]) -> tuple[str, ...]:
    """Remove the inputs for caches that the graph does not read; returns the names of the others."""
    caches = placeholders(gm.graph)[-1 - len(names) : -1]
    for node in caches:
        if not node.users:
            gm.graph.erase_node(node)
    gm.recompile()
    left = set(gm.graph.nodes)
    return tuple(name for name, node in zip(names, caches, strict=True) if node in left)


def _with_constants(tensors: Sequence[Tensor], constants: Mapping[int, Any]) -> Iterator[Any]:
    """All inputs of the model: `tensors` in order, with `constants` at their positions."""
    given = iter(tensors)
    for position in range(len(tensors) + len(constants)):
        yield constants[position] if position in constants else next(given)


@dataclass(frozen=True)
class PartedStep:
    """A traced step and the calls of subgraphs as which it is compiled; no calls where it runs op by op.

    Attributes:
        random: whether it draws random numbers.
    """

    traced: TracedStep
    calls: tuple[Call, ...]
    random: bool

    @cached_property
    def subgraphs(self) -> list[Subgraph]:
        """The distinct parts."""
        return list(dict.fromkeys(call.subgraph for call in self.calls))


def part_step(traced: TracedStep, lowering: str, whole: bool) -> PartedStep:
    """Rewrite the traced graph for Inductor, and partition it.

    Args:
        lowering: "inductor", or "eager" to run the graph op by op.
        whole: keep it as one part; else equal partitions are one.
    """
    if lowering == "eager":
        return PartedStep(traced, (), False)
    use_fast_linears(traced.graph.graph)
    multiply_before_widening(traced.graph.graph)
    fuse_routers(traced.graph.graph)
    fuse_selections(traced.graph.graph)
    calls = whole_graph(traced.graph) if whole else partition_graph(traced.graph)
    return PartedStep(traced, tuple(calls), any(map(draws_random_numbers, traced.graph.graph.nodes)))


def lower_parts(
    step: PartedStep,
    parts: Parts,
    all_sizes: bool,
    on_code: Callable[[str], None] | None = None,
    on_part: Callable[[int, int], None] = lambda number, count: None,
) -> CompiledStep:
    """Compile what of a step is not compiled yet.

    Args:
        parts: those of the model that are compiled already; not looked at where code is to be reported.
        all_sizes: whether one code may serve several sizes.
        on_code: called with the path of each file of code that Inductor wrote.
        on_part: called before each distinct part is compiled, with its number from 1 and how many there are.
    """
    subgraphs, calls = step.subgraphs, step.calls
    if not calls:
        return CompiledStep(step.traced, step.traced.graph)
    _log.debug("%d partitions, %d distinct subgraphs to compile", len(calls), len(subgraphs))
    codes = compile_parts(subgraphs, step.random, parts, all_sizes, on_code, on_part)
    compiled = dict(zip(subgraphs, codes, strict=True))
    partitions = tuple((call, compiled[call.subgraph]) for call in calls)
    return CompiledStep(step.traced, PartitionedExecutor(step.traced.graph, calls, compiled), partitions)


def compile_parts(
    subgraphs: Sequence[Part],
    random: bool,
    parts: Parts,
    all_sizes: bool,
    on_code: Callable[[str], None] | None = None,
    on_part: Callable[[int, int], None] = lambda number, count: None,
) -> list[Compiled]:
    """The code of parts of a step. What Inductor keeps of it on disk has the same keys in each process.

    Args:
        random: whether the step draws random numbers.
        parts, all_sizes, on_code, on_part: as in `lower_parts`.
    """
    compiled = list[Compiled]()
    tagged = torch.compiler.config.patch(cache_key_tag=_cache_key_tag())  # type: ignore[attr-defined]
    with joined_kernels(), tagged, same_keys_everywhere(), torch.inference_mode(False):
        for number, each in enumerate(subgraphs, start=1):
            on_part(number, len(subgraphs))
            compiled.append(parts.code(each, random, all_sizes, on_code))
    return compiled
