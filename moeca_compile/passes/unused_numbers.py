"""Inputs of Dynamo's graph that are numbers and that nothing reads.

before: graph(x, s0, t)   s0: a stride of x or t that varied, which Dynamo then makes an input
after:  graph(x, t)       the same graph as for the calls before
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx


def without_unused_numbers(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """The graph without these inputs, and the positions of those that stay. Dynamo still reads the graph itself."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    kept = [isinstance(value, Tensor) or bool(n.users) for n, value in zip(placeholders, inputs, strict=True)]
    if all(kept):
        return gm, tuple(range(len(kept)))
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    idle = {node for node, stays in zip(placeholders, kept, strict=True) if not stays}
    for node in gm.graph.nodes:
        if node not in idle:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(gm, graph), tuple(i for i, stays in enumerate(kept) if stays)


def called_with(positions: Sequence[int], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called with the inputs at these positions of those that are given."""

    def call(*inputs: Any) -> Any:
        return function(*(inputs[i] for i in positions))

    return call


def called_without(
    positions: Sequence[int], inputs: Sequence[Any], function: Callable[..., Any]
) -> Callable[..., Any]:
    """The function of all inputs, called with those at these positions. It reads none of the others."""
    if len(positions) == len(inputs):
        return function
    unread = {i: value for i, value in enumerate(inputs) if i not in set(positions)}

    def call(*given: Any) -> Any:
        values = dict(zip(positions, given, strict=True)) | unread
        return function(*(values[i] for i in range(len(values))))

    return call
