"""The model's own values on some inputs, which every check of a rewrite starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.lower.rounding import unit, with_noise
from moeca_compile.ops.body_run import call
from moeca_compile.passes.analysis.graph import ancestors, between, last_uses
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.evaluate import Compute
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.passes.rewrite.layers import layer_output
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.passes.rewrite.step import Step


class Teacher:
    """Values of the unchanged graph, and at each value that a recipe replaces, a call of `check`.

    Args:
        graph, regions: the normalized graph and what was matched in it.
        replacements: what is checked.
        inputs: one value for each placeholder.
        weights: the forecast weights of steps right after a full step.
        check: called with this, a replacement and the model's value of its node, in graph order.
    """

    def __init__(
        self,
        graph: fx.Graph,
        regions: Regions,
        replacements: Sequence[Replacement],
        inputs: Sequence[Any],
        weights: Tensor,
        check: Callable[[Teacher, Replacement, Any], None],
    ) -> None:
        self.graph, self.regions, self.inputs, self.weights = graph, regions, inputs, weights
        self.replacements = {replacement.node: replacement for replacement in replacements}
        self.check = check
        self.watched: Mapping[fx.Node, Callable[[Teacher, Any], None]] = {}
        """By a node where residual branches are added: called with this and the model's value, in graph order too."""
        self.computes: dict[fx.Node, Compute] = {}
        self.beginnings: dict[fx.Node, list[fx.Node]] = {}
        """By node, the values that it is compared with, which would be dropped by then."""
        compared = [(r.node, r.source) for r in replacements] + [(r.add, r.stream) for r in regions.residuals]
        for node, source in compared:
            self.beginnings.setdefault(node, []).append(source)
        self.step = self._step(StepKind(), {}, self.computes, kept=[source for _, source in compared])
        self.pupils: list[Step] = []
        """The steps that were `taught`."""
        self.values = self.step.values
        self.values.repeatable = True
        self.output = next(iter(reversed(graph.nodes)))

    def outputs(self) -> tuple[Any, ...]:
        """The model's outputs. The checks are made on the way."""
        self.computes |= {node: partial(layer_output, self.step, node) for node in self.regions.bodies}
        try:
            return tuple(self.values.run(self._computed))
        finally:  # what refers to a step would keep its values alive until Python looks for cycles
            self.computes.clear()
            for step in self.pupils:
                step.memo.clear()

    def _computed(self, node: fx.Node) -> None:
        """Check the value of a watched or replaced node. What the check computes once more is dropped again."""
        if node not in self.beginnings:
            return
        known = set(self.values.values)
        if node in self.watched:
            self.watched[node](self, self.values[node])
        if node in self.replacements:
            self.check(self, self.replacements[node], self.values[node])
        for again in self.values.values.keys() - known:
            if again.op == "call_function":
                del self.values.values[again]
        self.values.release(self.beginnings[node])

    def taught(self, kind: StepKind, state: Mapping[str, Tensor]) -> Step:
        """A step of this kind in which every value of the graph is the model's own."""
        step = self._step(kind, state, {})
        step.values = self.values
        self.pupils.append(step)
        return step

    def noisy(self, replacement: Replacement) -> Callable[[torch.Generator], list[Any]]:
        """The value of a replaced node, with noise in all that it is computed from its source by.

        What goes through a cache is rounded to that too.
        """
        span, device = between(replacement.source, [replacement.node]), self.weights.device
        units = [unit(spec.dtype, device) for spec in replacement.specs if spec.dtype.is_floating_point]
        cached = {node for cache in replacement.caches for node in cache.reads()} | {replacement.node}
        least = dict.fromkeys(cached, max(units, default=0.0))
        return lambda generator: self._with_noise(span, [replacement.node], generator, least)

    def noisy_outputs(self, generator: torch.Generator) -> tuple[Any, ...]:
        """The model's outputs, with noise in every value."""
        returned = self.output.all_input_nodes
        values = self._with_noise(ancestors(returned), returned, generator, {})
        known = dict(zip(returned, values, strict=True))
        return tuple(fx.map_arg(self.output.args[0], known.__getitem__))

    def _with_noise(
        self,
        nodes: set[fx.Node],
        wanted: Sequence[fx.Node],
        generator: torch.Generator,
        least: Mapping[fx.Node, float],
    ) -> list[Any]:
        """Values of `wanted`, where all `nodes` round differently and all others are the model's own."""
        noisy: dict[fx.Node, Any] = {}
        step = self._step(StepKind(), {}, {})
        step.values = _Overlaid(self.step, noisy)  # type: ignore[assignment]
        calls = [node for node in sorted(nodes) if node.op == "call_function"]
        dying = last_uses([(node, *node.all_input_nodes) for node in calls], wanted)
        for node, dead in zip(calls, dying, strict=True):
            value, arguments = self._run(step, node), [step[arg] for arg in node.all_input_nodes]
            noisy[node] = with_noise(node, value, arguments, generator, least.get(node, 0.0))
            for each in dead:
                noisy.pop(each, None)
        return [step[node] for node in wanted]

    def _run(self, step: Step, node: fx.Node) -> Any:
        if node in self.regions.bodies:
            return layer_output(step, node)
        return call(node, step.__getitem__)

    def _step(
        self,
        kind: StepKind,
        state: Mapping[str, Tensor],
        computes: Mapping[fx.Node, Compute],
        kept: Sequence[fx.Node] = (),
    ) -> Step:
        reads = dict.fromkeys(self.regions.bodies, ())
        return Step(self.graph, self.regions, kind, self.inputs, state, self.weights, computes, reads, kept)


class _Overlaid:
    """Values of a step, some of them replaced."""

    def __init__(self, step: Step, replaced: Mapping[fx.Node, Any]) -> None:
        self.step, self.replaced = step, replaced

    def __getitem__(self, node: fx.Node) -> Any:
        return self.replaced[node] if node in self.replaced else self.step[node]
