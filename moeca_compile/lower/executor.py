"""Run a graph that was cut into calls of compiled subgraphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx

from moeca_compile.lower.partition import Call, Subgraph

Compiled = Callable[..., Sequence[Any]]


class _Link(NamedTuple):
    """A call by places in the table of values: what it takes, where its results go, what is not needed after it."""

    function: Compiled
    arguments: list[int]
    results: list[int]
    done: list[int]


class PartitionedExecutor:
    """Calls of compiled subgraphs in order, from the graph's inputs to its outputs."""

    def __init__(self, gm: fx.GraphModule, calls: Sequence[Call], subgraphs: Mapping[Subgraph, Compiled]) -> None:
        nodes = list(gm.graph.nodes)
        place = {node: i for i, node in enumerate(n for n in nodes if n.op == "placeholder")}
        self.inputs = len(place)
        constants = [node for node in nodes if node.op == "get_attr"]
        self.constants = [getattr(gm, str(node.target)) for node in constants]
        for node in [*constants, *(result for call in calls for result in call.results)]:
            place[node] = len(place)
        self.size = len(place)
        returned = nodes[-1].args[0]
        self.outputs = [place[value] if isinstance(value, fx.Node) else None for value in returned]
        self.links: list[_Link] = []
        needed = {place for place in self.outputs if place is not None}
        for call in reversed(calls):
            arguments, results = ([place[n] for n in many] for many in (call.arguments, call.results))
            done = {*arguments, *results} - needed
            needed |= set(arguments)
            self.links.insert(0, _Link(subgraphs[call.subgraph], arguments, results, sorted(done)))

    def __call__(self, *inputs: Any) -> list[Any]:
        values = [*inputs, *self.constants, *[None] * (self.size - self.inputs - len(self.constants))]
        for function, arguments, results, done in self.links:
            for i, value in zip(results, function(*[values[i] for i in arguments]), strict=True):
                values[i] = value
            for i in done:
                values[i] = None
        return [None if i is None else values[i] for i in self.outputs]
