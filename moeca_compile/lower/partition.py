"""Cut a step's graph along its residual stream, so that partitions that are alike are compiled once.

The blocks of a transformer differ in their parameters and caches only. Aliases, which the evaluation of a step
leaves on the residual stream, cut the traced graph into partitions. Each becomes a graph of its own, with all that
it reads as inputs; partitions that are equal but for what they are given share one such graph, a *subgraph*.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.passes.analysis.graph import ancestors

BOUNDARY = torch.ops.aten.alias.default
Partition = list[fx.Node]


@dataclass(eq=False)
class Subgraph:
    """What all partitions of one form have in common, written with the nodes of the first of them.

    outputs: the positions in `nodes` of the values that some partition of this form hands on.
    """

    nodes: Partition
    inputs: list[fx.Node]
    outputs: set[int] = field(default_factory=set)

    def module(self) -> fx.GraphModule:
        """The graph of (inputs...) -> [outputs in order]."""
        graph = fx.Graph()
        copies = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(self.inputs)}
        for copy, node in zip(list(copies.values()), self.inputs, strict=True):
            copy.meta = dict(node.meta)
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output([copies[self.nodes[i]] for i in sorted(self.outputs)])
        return fx.GraphModule({}, graph)

    def examples(self) -> list[Tensor]:
        """Tensors with the shapes, strides and dtypes of the inputs; their values mean nothing."""
        values = [_tensor(node) for node in self.inputs]
        return [torch.empty_strided(v.size(), v.stride(), dtype=v.dtype, device=v.device) for v in values]


@dataclass(frozen=True)
class Call:
    """One partition of the graph: its subgraph, what that is given, and the nodes whose values it returns."""

    subgraph: Subgraph
    arguments: list[fx.Node]
    nodes: Partition

    @property
    def results(self) -> list[fx.Node]:
        return [self.nodes[i] for i in sorted(self.subgraph.outputs)]


def partition_graph(gm: fx.GraphModule) -> list[Call]:
    """The graph as calls of subgraphs, in order. Its boundaries are taken out of it."""
    return _calls(_joined(_partitions(gm.graph)))


def whole_graph(gm: fx.GraphModule) -> list[Call]:
    """The graph as one call. Its boundaries are taken out of it."""
    return _calls([[node for nodes in _partitions(gm.graph) for node in nodes]])


def _calls(partitions: list[Partition]) -> list[Call]:
    home = {node: i for i, nodes in enumerate(partitions) for node in nodes}
    subgraphs: dict[Any, Subgraph] = {}
    calls = []
    for i, nodes in enumerate(partitions):
        form, arguments = _form(nodes)
        subgraph = subgraphs.setdefault(form, Subgraph(nodes, arguments))
        subgraph.outputs |= {p for p, node in enumerate(nodes) if any(home.get(user) != i for user in node.users)}
        calls.append(Call(subgraph, arguments, nodes))
    return calls


def _partitions(graph: fx.Graph) -> list[Partition]:
    """The graph's ops from one boundary to the next.

    What follows the last one is for the most part what the policy keeps of each block. It goes back to the partition
    that it was computed in, so that this need not hand on everything that is kept; what is made of many partitions,
    such as all layers' counters, stays behind them all, or the last block would not be like the others.
    """
    found: list[Partition] = [[]]
    handed_on: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.target is BOUNDARY:
            handed_on.add(node.all_input_nodes[0])
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            found.append([])
        elif node.target is operator.getitem:  # with what it is a part of, for only tensors are handed on
            next(nodes for nodes in found if node.args[0] in nodes).append(node)
        elif node.op == "call_function":
            found[-1].append(node)
    stays = _changed_in_place(graph)
    _hoist_shared(found, stays | handed_on)
    tail = found.pop()
    found.append([])
    home = {node: i for i, nodes in enumerate(found) for node in nodes}
    for node in tail:
        inputs = node.all_input_nodes
        ready = [home[arg] + (arg in handed_on) for arg in inputs if arg in home]
        if stays & set(inputs) or len(set(ready)) > 2:
            ready.append(len(found) - 1)
        if ready:
            _assign(node, max(ready), home, found)
    for node in tail:
        _assign(node, len(found) - 1, home, found)
    return [nodes for nodes in found if nodes]


def _hoist_shared(found: list[Partition], ends: set[fx.Node]) -> None:
    """Move what comes of the inputs alone, and more than two partitions read, to the front.

    Else the first block, where the conditioning of all blocks happens to be computed, would not be like the others.
    Not past `ends`: the stream, and what is changed in place.
    """
    home = {node: i for i, nodes in enumerate(found) for node in nodes}
    free: set[fx.Node] = set()
    for node in (node for nodes in found for node in nodes):
        inputs = node.all_input_nodes
        if not ends & {node, *inputs} and all(arg in free or arg not in home for arg in inputs):
            free.add(node)
    shared = {node for node in free if len({home.get(user) for user in node.users}) > 2 and not _is_tuple(node)}
    moved = ancestors(list(shared)) & free
    for place, nodes in enumerate(found[1:], start=1):
        found[0] += [node for node in nodes if node in moved]
        found[place] = [node for node in nodes if node not in moved]


def _is_tuple(node: fx.Node) -> bool:
    return any(user.target is operator.getitem for user in node.users)


def _assign(node: fx.Node, place: int, home: dict[fx.Node, int], found: list[Partition]) -> None:
    """Give `node` a home, and before it those of its inputs that have none: they can be computed anywhere."""
    if node not in home and node.op == "call_function":
        for arg in node.all_input_nodes:
            _assign(arg, place, home, found)
        home[node] = place
        found[place].append(node)


def _changed_in_place(graph: fx.Graph) -> set[fx.Node]:
    """The values that some op of the graph writes to; what reads them must keep its place."""
    return {
        arg for node in graph.nodes if node.op == "call_function" and node.is_impure() for arg in node.all_input_nodes
    }


def _joined(partitions: list[Partition]) -> list[Partition]:
    """Neighbors of which none has its like elsewhere become one: nothing is gained by compiling them apart."""
    forms = [_form(nodes)[0] for nodes in partitions]
    count = Counter(forms)
    joined: list[Partition] = []
    for alone, group in groupby(zip(forms, partitions, strict=True), key=lambda each: count[each[0]] == 1):
        members = [nodes for _, nodes in group]
        joined += [[node for nodes in members for node in nodes]] if alone else members
    return joined


def _form(nodes: Partition) -> tuple[Any, list[fx.Node]]:
    """All that has to be equal for two partitions to be the same graph, and what this one reads from outside."""
    number: dict[fx.Node, int] = {}
    inside = set(nodes)
    arguments: list[fx.Node] = []
    lines = []
    for node in nodes:
        for arg in node.all_input_nodes:
            if arg not in inside and arg not in number:
                number[arg] = -1 - len(arguments)
                arguments.append(arg)
        args = fx.map_arg((node.args, node.kwargs), lambda arg: f"%{number[arg]}")
        lines.append((node.target, repr(args)))
        number[node] = len(number)
    return (tuple(lines), tuple(map(_described, arguments))), arguments


def _described(node: fx.Node) -> Any:
    value = _tensor(node)
    return tuple(value.size()), value.stride(), value.dtype, value.device


def _tensor(node: fx.Node) -> Tensor:
    if node.op == "get_attr":  # a constant that tracing found
        value: Tensor = getattr(node.graph.owning_module, str(node.target))
        return value
    value = node.meta["val"]
    return value
