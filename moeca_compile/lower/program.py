"""One compiled graph for one step kind at one input shape: traced, lowered, and checked when first used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile._torch_private import compile_graph, trace_to_graph
from moeca_compile.lower.executor import Chain
from moeca_compile.lower.partition import outline, uncut
from moeca_compile.ops.linear import use_fast_linears
from moeca_compile.passes.rewrite.step_function import StepFunction, StepResult


class Program:
    """A step function behind flat arguments, compiled.

    The state's tensors that ops change in place are passed in and stay; those that the graph gives anew come
    back as updates, which the caller puts in place of the old ones (no copy).
    """

    def __init__(
        self, function: StepFunction, inputs: Sequence[Any], state: dict[str, Tensor], clock: Tensor
    ) -> None:
        self.function = function
        self.state_names = list(state)
        self.constants = {i: v for i, v in enumerate(inputs) if not isinstance(v, Tensor)}
        self.update_names: list[str] = []
        self.outputs = 0
        self.graph = self._trace(inputs, state, clock)
        self.compiled: Callable[..., Any] | None = None

    def lower(self, whole: bool) -> None:
        """Compile the traced graph with Inductor: as a whole, or stretches of it that are alike once."""
        use_fast_linears(self.graph.graph)
        calls = uncut(self.graph) if whole else outline(self.graph)
        distinct = dict.fromkeys(call.unit for call in calls)
        units = {unit: compile_graph(unit.module(), unit.examples()) for unit in distinct}
        self.compiled = Chain(self.graph, calls, units)

    def __call__(self, inputs: Sequence[Any], state: dict[str, Tensor], clock: Tensor) -> StepResult:
        assert self.compiled is not None, "lower() comes first"
        results = self.compiled(*self._flat(inputs, state, clock))
        return self._unflatten(tuple(results))

    def _trace(self, inputs: Sequence[Any], state: dict[str, Tensor], clock: Tensor) -> fx.GraphModule:
        def flat_function(*arguments: Tensor) -> list[Tensor]:
            tensors = list(arguments)
            clock = tensors.pop()
            count = len(tensors) - len(self.state_names)
            given = iter(tensors[:count])
            total = count + len(self.constants)
            values = [self.constants[i] if i in self.constants else next(given) for i in range(total)]
            result = self.function(values, dict(zip(self.state_names, tensors[count:], strict=True)), clock)
            self.update_names, self.outputs = sorted(result.updates), len(result.outputs)
            counts = [] if result.counts is None else [result.counts]
            return [*result.outputs, *(result.updates[name] for name in self.update_names), *counts]

        with torch.no_grad():
            return trace_to_graph(flat_function, *self._flat(inputs, state, clock))

    def _flat(self, inputs: Sequence[Any], state: dict[str, Tensor], clock: Tensor) -> list[Tensor]:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        return [*tensors, *(state[name] for name in self.state_names), clock]

    def _unflatten(self, results: tuple[Any, ...]) -> StepResult:
        middle = self.outputs + len(self.update_names)
        updates = dict(zip(self.update_names, results[self.outputs : middle], strict=True))
        counts = results[middle] if len(results) > middle else None
        return StepResult(results[: self.outputs], updates, counts)
