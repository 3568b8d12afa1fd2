"""Run a planned body: one walk over its steps, and a provider for what differs between devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from moeca_compile.ops import bodies
from moeca_compile.ops.body_plan import BodyPlan, GroupedProduct, plan_for
from moeca_compile.ops.linear import grouped_linear
from moeca_compile.ops.unsupported import UnsupportedError

Values = dict[fx.Node, Any]
"""What the nodes of a body stand for, on the rows of all experts sorted by expert."""


class Provider(Protocol):
    """How a device runs the steps that read parameters of the experts."""

    def product(self, step: GroupedProduct, values: Values) -> Tensor:
        """The rows of each expert by its own weight."""

    def row_op(self, node: fx.Node, values: Values) -> Tensor:
        """An op on rows, each with its expert's parameters."""


def run_steps(plan: BodyPlan, values: Values, provider: Provider) -> Tensor:
    """The output (M, width) of a plan, by position in the sorted rows.

    `values` has those of the inputs, and loses each that is read no more.
    """
    for step, done in zip(plan.steps, plan.last_read, strict=True):
        if isinstance(step, GroupedProduct):
            values[step.node] = provider.product(step, values)
        elif step.reads_parameters:
            values[step.node] = provider.row_op(step.node, values)
        else:
            values[step.node] = call(step.node, values.__getitem__)
        for node in done:
            values.pop(node, None)
    out: Tensor = values[plan.output]
    return out


def call(node: fx.Node, value_of: Callable[[fx.Node], Any], function: Any = None) -> Any:
    """What the op of `node`, or `function` in its place, gives for the values of its arguments."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    function = function or node.target
    return function(*args, **kwargs)


def parameter_values(plan: BodyPlan, parameters: Sequence[Sequence[Tensor]]) -> dict[fx.Node, list[Tensor]]:
    """Every parameter and what is computed from parameters alone, one tensor an expert.

    Args:
        parameters: those of each expert.
    """
    values = {node: list(each) for node, each in zip(plan.parameters, zip(*parameters, strict=True), strict=True)}
    for node in plan.per_expert:
        values[node] = [
            call(node, {n: each[e] for n, each in values.items()}.__getitem__) for e in range(len(parameters))
        ]
    return values


def by_expert(parameters: Sequence[Tensor], experts: int) -> list[Sequence[Tensor]]:
    """The parameters of each expert, of expert-major ones."""
    each = len(parameters) // experts
    return [parameters[e * each : (e + 1) * each] for e in range(experts)]


def run_by_expert(body: str, rows: list[Tensor], offsets: Tensor, parameters: list[Tensor], experts: int) -> Tensor:
    """Each expert on its own rows, by ATen ops on any device, which is waited for.

    Args:
        body: its key (ops.bodies).
        rows: each (R, ...), sorted by expert.
        offsets: (experts + 1,) int64, where the rows of each expert begin, and R.
        parameters: expert-major, experts * P tensors.

    Returns:
        (R, width).
    """
    bounds = list(pairwise(offsets.tolist()))
    live = [e for e, (start, end) in enumerate(bounds) if end > start] or [0]
    groups, each = [bounds[e] for e in live], by_expert(parameters, experts)
    own = [each[e] for e in live]
    try:
        plan = plan_for(body, rows, own[0])
    except UnsupportedError:
        each_rows = ([value[start:end] for value in rows] for start, end in groups)
        return torch.cat([bodies.run(body, x, list(p)) for x, p in zip(each_rows, own, strict=True)])
    return run_steps(plan, dict(zip(plan.rows, rows, strict=True)), AtenProvider(parameter_values(plan, own), groups))


@dataclass
class AtenProvider:
    """ATen ops, and on CPU the kernels of `ops.linear`.

    Attributes:
        parameters: of the experts that have rows, and what is computed from them.
        groups: where the rows of each begin and end.
    """

    parameters: dict[fx.Node, list[Tensor]]
    groups: list[tuple[int, int]]

    def product(self, step: GroupedProduct, values: Values) -> Tensor:
        (linear,) = step.slices
        x, weights = values[linear.rows], self.parameters[linear.weight]
        if linear.transposed:
            weights = [weight.t() for weight in weights]
        biases = None if linear.bias is None else self.parameters[linear.bias]
        flat = x.flatten(0, -2)
        per_row = len(flat) // max(len(x), 1)
        offsets = torch.tensor([0, *(end * per_row for _, end in self.groups)])
        return grouped_linear(flat, offsets, weights, biases).view(*x.shape[:-1], len(weights[0]))

    def row_op(self, node: fx.Node, values: Values) -> Tensor:
        def on_its_rows(expert: int, start: int, end: int) -> Any:
            def value_of(source: fx.Node) -> Any:
                if source in self.parameters:
                    return self.parameters[source][expert]
                return fx.node.map_aggregate(values[source], lambda v: v[start:end] if isinstance(v, Tensor) else v)

            return call(node, value_of)

        return torch.cat([on_its_rows(expert, *group) for expert, group in enumerate(self.groups)])
