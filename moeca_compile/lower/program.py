"""A step as compiled code: its function is traced to one graph of flat tensors, and that is lowered."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile._torch_private import compile_graph, trace_to_graph
from moeca_compile.lower.executor import PartitionedExecutor
from moeca_compile.lower.partition import partition_graph, whole_graph
from moeca_compile.ops.linear import use_fast_linears
from moeca_compile.passes.analysis.flops import StepFlops, step_flops
from moeca_compile.passes.rewrite.step_function import StepFunction, StepResult

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TracedStep:
    """A step as a graph of (tensor inputs..., caches..., coefficients) -> [outputs..., updates..., counts].

    Attributes:
        state_names: the caches, in the order of the graph's inputs.
        update_names: the caches that the graph gives anew, in the order of its outputs.
        outputs: how many outputs the model has.
    """

    graph: fx.GraphModule
    state_names: tuple[str, ...]
    update_names: tuple[str, ...]
    outputs: int

    def result(self, values: Sequence[Any]) -> StepResult:
        """The step's result from the graph's outputs."""
        end = self.outputs + len(self.update_names)
        updates = dict(zip(self.update_names, values[self.outputs : end], strict=True))
        return StepResult(tuple(values[: self.outputs]), updates, values[end] if len(values) > end else None)

    @cached_property
    def flops(self) -> StepFlops:
        """The floating-point operations of the step, counted on its graph."""
        return step_flops(self.graph.graph)


@dataclass(frozen=True)
class CompiledStep:
    """A lowered step. Caches that ops change in place are passed in and stay; those that the graph gives anew come
    back as updates, which the caller puts in place of the old ones (no copy)."""

    traced: TracedStep
    code: Callable[..., Sequence[Any]]

    def __call__(self, inputs: Sequence[Any], state: dict[str, Tensor], coefficients: Tensor) -> StepResult:
        flat = flat_inputs(inputs, [state[name] for name in self.traced.state_names], coefficients)
        return self.traced.result(self.code(*flat))


def trace_step(
    function: StepFunction, inputs: Sequence[Any], state: dict[str, Tensor], coefficients: Tensor
) -> TracedStep:
    """The step as one graph, at the sizes of these inputs."""
    names, constants = tuple(state), {i: v for i, v in enumerate(inputs) if not isinstance(v, Tensor)}
    found: dict[str, Any] = {}

    def flat_function(*arguments: Tensor) -> list[Tensor]:
        *tensors, coefficients = arguments
        given = tensors[: len(tensors) - len(names)]
        cached = dict(zip(names, tensors[len(given) :], strict=True))
        result = function(list(_with_constants(given, constants)), cached, coefficients)
        found["updates"], found["outputs"] = tuple(sorted(result.updates)), len(result.outputs)
        counts = [] if result.counts is None else [result.counts]
        return [*result.outputs, *(result.updates[name] for name in found["updates"]), *counts]

    with torch.no_grad():
        graph = trace_to_graph(flat_function, *flat_inputs(inputs, list(state.values()), coefficients))
    return TracedStep(graph, names, found["updates"], found["outputs"])


def flat_inputs(inputs: Sequence[Any], caches: Sequence[Tensor], coefficients: Tensor) -> list[Tensor]:
    """A traced step's inputs; what is no tensor among the model's is a constant of its graph."""
    return [*(value for value in inputs if isinstance(value, Tensor)), *caches, coefficients]


def _with_constants(tensors: Sequence[Tensor], constants: Mapping[int, Any]) -> Iterator[Any]:
    """The model's inputs: the tensors in their order, with the other values at their positions."""
    given = iter(tensors)
    for position in range(len(tensors) + len(constants)):
        yield constants[position] if position in constants else next(given)


def lower_step(
    traced: TracedStep, lowering: str, whole: bool, on_code: Callable[[str], None] | None = None
) -> CompiledStep:
    """Compile the traced graph.

    Args:
        lowering: "inductor", or "eager" to run the graph op by op.
        whole: compile it as a whole, else partitions of it that are alike once.
        on_code: is given the path of each file of code that Inductor wrote.
    """
    if lowering == "eager":
        return CompiledStep(traced, traced.graph)
    use_fast_linears(traced.graph.graph)
    calls = whole_graph(traced.graph) if whole else partition_graph(traced.graph)
    distinct = dict.fromkeys(call.subgraph for call in calls)
    _log.debug("%d partitions, %d distinct subgraphs to compile", len(calls), len(distinct))
    compiled = {each: compile_graph(each.module(), each.examples(), on_code) for each in distinct}
    return CompiledStep(traced, PartitionedExecutor(traced.graph, calls, compiled))
