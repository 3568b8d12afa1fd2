"""Run nodes of a traced graph one by one, as eager mode does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx

Change = Callable[[fx.Node, Any, Sequence[Any]], Any]
"""Called with a node, its value and those of its inputs; returns the value to go on with."""


def interpret(
    nodes: Sequence[fx.Node], inputs: Mapping[fx.Node, Any], wanted: Sequence[fx.Node], change: Change | None = None
) -> list[Any]:
    """Values of `wanted` after running `nodes` in order.

    Args:
        nodes: calls of functions, each after the ones that it reads.
        inputs: the values of all other nodes that they read. Ops write to some of them.
        wanted: some of `nodes` or of the inputs.
        change: changes each value as it is computed.
    """
    values, dying = dict(inputs), last_uses(nodes, wanted)
    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        values[node] = value if change is None else change(node, value, [values[arg] for arg in node.all_input_nodes])
        for dead in dying[node]:
            del values[dead]
    return [values[node] for node in wanted]


def last_uses(nodes: Sequence[fx.Node], wanted: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node, those of `nodes` and their inputs that nothing after it reads."""
    found: dict[fx.Node, list[fx.Node]] = {}
    seen = set(wanted)
    for node in reversed(nodes):
        found[node] = [each for each in {node, *node.all_input_nodes} if each not in seen]
        seen.update(found[node])
    return found
