"""Run a partitioned graph: its compiled subgraphs, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx

from moeca_compile.lower.partition import Call, Subgraph
from moeca_compile.passes.analysis.graph import last_uses

Compiled = Callable[..., Sequence[Any]]


class _BoundCall(NamedTuple):
    """A call of a subgraph, by indices into the table of values: arguments, results, and what to free after it."""

    function: Compiled
    arguments: list[int]
    results: list[int]
    freed: list[int]


class PartitionedExecutor:
    """Calls of compiled subgraphs in order, from the graph's inputs to its outputs."""

    def __init__(self, gm: fx.GraphModule, calls: Sequence[Call], subgraphs: Mapping[Subgraph, Compiled]) -> None:
        nodes = list(gm.graph.nodes)
        index = {node: i for i, node in enumerate(n for n in nodes if n.op == "placeholder")}
        self.inputs = len(index)
        constants = [node for node in nodes if node.op == "get_attr"]
        self.constants = [getattr(gm, str(node.target)) for node in constants]
        for node in [*constants, *(result for call in calls for result in call.results)]:
            index[node] = len(index)
        self.size = len(index)
        returned = nodes[-1].args[0]
        self.outputs = [index[value] if isinstance(value, fx.Node) else None for value in returned]
        bound = [[[index[n] for n in many] for many in (call.arguments, call.results)] for call in calls]
        kept = {*range(self.inputs), *(i for i in self.outputs if i is not None)}  # the caller holds the inputs
        freed = last_uses([arguments + results for arguments, results in bound], kept)
        self.calls = [
            _BoundCall(subgraphs[call.subgraph], arguments, results, dead)
            for call, (arguments, results), dead in zip(calls, bound, freed, strict=True)
        ]

    def __call__(self, *inputs: Any) -> list[Any]:
        if len(inputs) != self.inputs:
            raise TypeError(f"a step takes {self.inputs} inputs, not {len(inputs)}")
        values = [*inputs, *self.constants, *[None] * (self.size - self.inputs - len(self.constants))]
        for function, arguments, results, freed in self.calls:
            for i, value in zip(results, function(*[values[i] for i in arguments]), strict=True):
                values[i] = value
            for i in freed:
                values[i] = None
        return [None if i is None else values[i] for i in self.outputs]
