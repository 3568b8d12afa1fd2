"""Run nodes of a traced graph one by one, as eager mode does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import fx

from moeca_compile.ops.body_run import call
from moeca_compile.passes.analysis.graph import last_uses

Change = Callable[[fx.Node, Any, Sequence[Any]], Any]
"""Called with a node, its value and those of its inputs; returns the value to go on with."""

Given = Callable[[fx.Node, fx.Node, Any], Any]
"""Called with a node, one of its inputs and the value of that; returns what the node's op is given."""


def interpret(
    nodes: Sequence[fx.Node],
    inputs: Mapping[fx.Node, Any],
    wanted: Sequence[fx.Node],
    change: Change | None = None,
    given: Given | None = None,
) -> list[Any]:
    """Values of `wanted` after running `nodes` in order.

    Args:
        nodes: calls of functions, each after the ones that it reads.
        inputs: the values of all other nodes that they read. Ops write to some of them.
        wanted: some of `nodes` or of the inputs.
        change: changes each value as it is computed.
        given: changes what each node is given.
    """
    values, dying = dict(inputs), last_uses([(node, *node.all_input_nodes) for node in nodes], wanted)
    for node, dead in zip(nodes, dying, strict=True):
        value = call(node, values.__getitem__ if given is None else partial(_changed, node, values, given))
        values[node] = value if change is None else change(node, value, [values[arg] for arg in node.all_input_nodes])
        for each in dead:
            del values[each]
    return [values[node] for node in wanted]


def _changed(node: fx.Node, values: Mapping[fx.Node, Any], given: Given, source: fx.Node) -> Any:
    return given(node, source, values[source])
