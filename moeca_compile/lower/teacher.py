"""The model's own values on some inputs, which every check of a rewrite starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.lower.rounding import with_noise
from moeca_compile.passes.analysis.graph import ancestors, between
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.evaluate import Compute
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.passes.rewrite.layers import layer_output
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.passes.rewrite.step import Step


class Teacher:
    """Values of the unchanged graph.

    Args:
        graph, regions: the normalized graph and what was matched in it.
        inputs: one value for each placeholder.
        coefficients: the forecast coefficients of steps right after a full step.
    """

    def __init__(self, graph: fx.Graph, regions: Regions, inputs: Sequence[Any], coefficients: Tensor) -> None:
        self.graph, self.regions, self.inputs, self.coefficients = graph, regions, inputs, coefficients
        computes: dict[fx.Node, Compute] = {}
        self.step = self._step(StepKind(), {}, computes)
        computes |= {marker: partial(layer_output, self.step, marker) for marker in regions.bodies}
        self.output = next(iter(reversed(graph.nodes)))

    def __getitem__(self, node: fx.Node) -> Any:
        return self.step[node]

    def outputs(self) -> tuple[Any, ...]:
        """The model's outputs."""
        return tuple(self.step.run())

    def taught(self, kind: StepKind, state: Mapping[str, Tensor]) -> Step:
        """A step of this kind in which every value of the graph is the model's own."""
        step = self._step(kind, state, {})
        step.values = self.step.values
        return step

    def noisy(self, replacement: Replacement) -> Callable[[torch.Generator], list[Any]]:
        """The value of a replaced node, with noise in all that it is computed from its source by."""
        span = between(replacement.source, [replacement.node])
        return lambda generator: self._with_noise(span, [replacement.node], generator)

    def noisy_outputs(self, generator: torch.Generator) -> tuple[Any, ...]:
        """The model's outputs, with noise in every value."""
        returned = self.output.all_input_nodes
        values = self._with_noise(ancestors(returned), returned, generator)
        known = dict(zip(returned, values, strict=True))
        return tuple(fx.map_arg(self.output.args[0], known.__getitem__))

    def _with_noise(self, nodes: set[fx.Node], wanted: Sequence[fx.Node], generator: torch.Generator) -> list[Any]:
        """Values of `wanted`, where all `nodes` round differently and all others are the model's own."""
        noisy: dict[fx.Node, Any] = {}
        step = self._step(StepKind(), {}, {})
        step.values = _Overlaid(self.step, noisy)  # type: ignore[assignment]
        for node in sorted(nodes):
            if node.op == "call_function":
                value = self._run(step, node)
                noisy[node] = with_noise(node, value, [step[arg] for arg in node.all_input_nodes], generator)
        return [step[node] for node in wanted]

    def _run(self, step: Step, node: fx.Node) -> Any:
        if node in self.regions.bodies:
            return layer_output(step, node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), step.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _step(self, kind: StepKind, state: Mapping[str, Tensor], computes: Mapping[fx.Node, Compute]) -> Step:
        return Step(self.graph, self.regions, kind, self.inputs, state, self.coefficients, computes)


class _Overlaid:
    """Values of a step, some of them replaced."""

    def __init__(self, step: Step, replaced: Mapping[fx.Node, Any]) -> None:
        self.step, self.replaced = step, replaced

    def __getitem__(self, node: fx.Node) -> Any:
        return self.replaced[node] if node in self.replaced else self.step[node]
