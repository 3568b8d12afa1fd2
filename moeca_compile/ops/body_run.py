"""Run a planned body. The loop over its steps is the same on every device; a provider runs what differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from moeca_compile.ops import bodies
from moeca_compile.ops.body_plan import BodyPlan, GroupedProduct, plan_for
from moeca_compile.ops.exchange import room, run_on_ranks
from moeca_compile.ops.linear import grouped_linear
from moeca_compile.ops.unsupported import UnsupportedError

Values = dict[fx.Node, Any]
"""The values of a body's nodes, on the rows of all experts, sorted by expert."""


class Provider(Protocol):
    """Runs the steps that read the experts' parameters."""

    def product(self, step: GroupedProduct, values: Values) -> Tensor:
        """The product of each expert's rows with its own weight."""

    def row_op(self, node: fx.Node, values: Values) -> Tensor:
        """An op on rows, where each row takes the parameters of its expert."""


def run_steps(plan: BodyPlan, values: Values, provider: Provider) -> Tensor:
    """Run a plan. Returns its output (M, width) for the sorted rows.

    `values` has the values of the inputs. Values are removed from it after their last use.
    """
    for step, unused in zip(plan.steps, plan.last_read, strict=True):
        if isinstance(step, GroupedProduct):
            values[step.node] = provider.product(step, values)
        elif step.reads_parameters:
            values[step.node] = provider.row_op(step.node, values)
        else:
            values[step.node] = call(step.node, values.__getitem__)
        for node in unused:
            values.pop(node, None)
    out: Tensor = values[plan.output]
    return out


def call(node: fx.Node, value_of: Callable[[fx.Node], Any], function: Any = None) -> Any:
    """Run the op of `node`, or `function` instead, on the values of its arguments."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    function = function or node.target
    return function(*args, **kwargs)


def parameter_values(plan: BodyPlan, parameters: Sequence[Sequence[Tensor]]) -> dict[fx.Node, list[Tensor]]:
    """The values of parameters, and of nodes computed from parameters alone: one tensor for each expert.

    Args:
        parameters: for each expert, its parameters.
    """
    values = {node: list(each) for node, each in zip(plan.parameters, zip(*parameters, strict=True), strict=True)}
    for node in plan.per_expert:
        values[node] = [
            call(node, {n: each[e] for n, each in values.items()}.__getitem__) for e in range(len(parameters))
        ]
    return values


def by_expert(parameters: Sequence[Tensor], experts: int) -> list[Sequence[Tensor]]:
    """Split expert-major parameters into those of each expert."""
    each = len(parameters) // experts
    return [parameters[e * each : (e + 1) * each] for e in range(experts)]


def run_by_expert(
    body: str,
    rows: Sequence[Tensor],
    offsets: Tensor,
    parameters: Sequence[Tensor],
    experts: int,
    source: Tensor | None = None,
    k: int = 1,
) -> Iterator[tuple[slice, Tensor]]:
    """Run each expert on its own rows, by ATen ops on any device. The host waits for `offsets`.

    Where ranks of a process group hold the experts, all of them must call this together.

    Args:
        body: its key (ops.bodies).
        rows: each (T, ...).
        offsets: (experts + 1,) int64, where the branches of each expert begin; the last is M.
        parameters: expert-major, experts * P tensors; those of this rank where others hold experts too.
        experts: number of experts.
        source: (M,) the row that each branch reads, sorted by expert; None where they read all rows in order.
        k: the most branches that a row has.

    Yields:
        Branches of a few experts (R of M), and their outputs (R, width).
    """

    group, places = bodies.exchange_of(body)
    if not group:
        yield from _run_here(body, rows, offsets, parameters, experts, source)
        return

    def run_own(arrived: list[Tensor], own_offsets: Tensor) -> Tensor:
        own = len(own_offsets) - 1
        return torch.cat([out for _, out in _run_here(body, arrived, own_offsets, parameters, own, None)])

    given = [value if source is None else value.index_select(0, source) for value in rows]
    most = room(places, len(rows[0]), k, bodies.held_here(body, experts))
    yield slice(0, len(given[0])), run_on_ranks(group, given, offsets, run_own, most)


def _run_here(
    body: str,
    rows: Sequence[Tensor],
    offsets: Tensor,
    parameters: Sequence[Tensor],
    experts: int,
    source: Tensor | None,
) -> Iterator[tuple[slice, Tensor]]:
    """`run_by_expert` of experts that this process holds."""

    def rows_of(branches: slice) -> list[Tensor]:
        return [value[branches] if source is None else value.index_select(0, source[branches]) for value in rows]

    bounds = list(pairwise(offsets.tolist()))
    live = [e for e, (start, end) in enumerate(bounds) if end > start] or [0]
    groups, each = [bounds[e] for e in live], by_expert(parameters, experts)
    own = [each[e] for e in live]
    try:
        plan = plan_for(body, rows, own[0])
    except UnsupportedError:
        for (start, end), p in zip(groups, own, strict=True):
            yield slice(start, end), bodies.run(body, rows_of(slice(start, end)), list(p))
        return
    for part in _parts(groups):
        (start, _), (_, end) = groups[part.start], groups[part.stop - 1]
        provider = AtenProvider(parameter_values(plan, own[part]), [(a - start, b - start) for a, b in groups[part]])
        inputs = dict(zip(plan.rows, rows_of(slice(start, end)), strict=True))
        yield slice(start, end), run_steps(plan, inputs, provider)


_ROWS = 512
"""Experts run together until they have so many rows. More take memory for what lies between their layers, and gain
nothing: the products are large by then."""


def _parts(groups: Sequence[tuple[int, int]]) -> Iterator[slice]:
    """The experts, by index, in parts that run together."""
    first = 0
    for i, (_, end) in enumerate(groups):
        if end - groups[first][0] >= _ROWS or i == len(groups) - 1:
            yield slice(first, i + 1)
            first = i + 1


@dataclass
class AtenProvider:
    """Runs steps by ATen ops, and products on CPU by `ops.linear`.

    Attributes:
        parameters: values of parameters (`parameter_values`) of the experts that have rows.
        groups: where the rows of each of these experts begin and end.
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
