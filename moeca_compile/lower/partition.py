"""Partition a step's graph along its residual stream, so that equal partitions are compiled once.

The blocks of a transformer differ only in their parameters and caches. The evaluation of a step marks the residual
stream with alias ops, the *boundaries*; the ops between two boundaries are a *partition*. Partitions with the same
ops on inputs of the same shapes, strides and dtypes share one *subgraph*, which takes all that they read as inputs.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile._torch_private import schema_of
from moeca_compile.passes.analysis.graph import ancestors

BOUNDARY = torch.ops.aten.alias.default
Partition = list[fx.Node]


@dataclass(eq=False)
class Subgraph:
    """The graph that equal partitions share, as the nodes of the first of them.

    Attributes:
        nodes: the ops, in order.
        inputs: the nodes outside that they read.
        outputs: indices in `nodes` of the values that some of these partitions must return.
    """

    nodes: Partition
    inputs: list[fx.Node]
    outputs: set[int] = field(default_factory=set)

    def module(self) -> fx.GraphModule:
        """The subgraph as a module: (inputs...) -> [outputs in order]."""
        graph = fx.Graph()
        copies = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(self.inputs)}
        for copy, node in zip(list(copies.values()), self.inputs, strict=True):
            copy.meta = dict(node.meta)
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output([copies[self.nodes[i]] for i in sorted(self.outputs)])
        return fx.GraphModule({}, graph)

    def examples(self) -> list[Tensor]:
        """Tensors like the inputs, most of them fake."""
        return [_tensor(node) for node in self.inputs]


@dataclass(frozen=True)
class Call:
    """One partition: its subgraph, the arguments of that, and the partition's own nodes."""

    subgraph: Subgraph
    arguments: list[fx.Node]
    nodes: Partition

    @property
    def results(self) -> list[fx.Node]:
        return [self.nodes[i] for i in sorted(self.subgraph.outputs)]


def partition_graph(gm: fx.GraphModule) -> list[Call]:
    """The graph as calls of subgraphs, in order. Removes the boundaries from the graph."""
    return _calls(_joined(_partitions(gm.graph)))


def whole_graph(gm: fx.GraphModule) -> list[Call]:
    """The graph as one call. Removes the boundaries from the graph."""
    return _calls([[node for nodes in _partitions(gm.graph) for node in nodes]])


def one_call(graph: fx.Graph) -> Call:
    """The graph as one call. It does not change."""
    (call,) = _calls([[node for node in graph.nodes if node.op == "call_function"]])
    return call


def _calls(partitions: list[Partition]) -> list[Call]:
    owner = {node: i for i, nodes in enumerate(partitions) for node in nodes}
    subgraphs: dict[Any, Subgraph] = {}
    calls = []
    for i, nodes in enumerate(partitions):
        form, arguments = _form(nodes)
        subgraph = subgraphs.setdefault(form, Subgraph(nodes, arguments))
        subgraph.outputs |= {p for p, node in enumerate(nodes) if any(owner.get(user) != i for user in node.users)}
        calls.append(Call(subgraph, arguments, nodes))
    return calls


def _partitions(graph: fx.Graph) -> list[Partition]:
    """The graph's ops, partitioned at the boundaries.

    Most ops after the last boundary store what the policy caches of each block. They move to the partition whose
    values they read, so that it need not return those. Ops that read many partitions, such as those that stack the
    counters of all layers, stay in a last partition of their own; in the last block they would make it unique.
    """
    found: list[Partition] = [[]]
    streams: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.target is BOUNDARY:
            streams.add(node.all_input_nodes[0])
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            found.append([])
        elif node.target is operator.getitem:  # stays with its tuple: partitions return tensors only
            next(nodes for nodes in found if node.args[0] in nodes).append(node)
        elif node.op == "call_function":
            found[-1].append(node)
    writers = {arg: node for node in graph.nodes for arg in written_by(node)}
    _hoist_shared(found, streams | set(writers))
    tail = found.pop()
    found.append([])
    owner = {node: i for i, nodes in enumerate(found) for node in nodes}
    for node in tail:
        inputs = node.all_input_nodes
        ready = [owner[arg] + (arg in streams) for arg in inputs if arg in owner]
        if len(set(ready)) > 2:
            ready.append(len(found) - 1)
        others = [writers[arg] for arg in inputs if writers.get(arg, node) is not node]
        ready += [owner.get(writer, len(found) - 1) for writer in others]
        if ready:
            _assign(node, max(ready), owner, found)
    for node in tail:
        _assign(node, len(found) - 1, owner, found)
    return [nodes for nodes in found if nodes]


def _hoist_shared(found: list[Partition], ends: set[fx.Node]) -> None:
    """Move what depends on the inputs alone, and is read by more than two partitions, to the first partition.

    Otherwise the first block would differ from the others, since the conditioning of all blocks is computed there.
    Nodes of `ends` (the residual stream, values that are changed in place) and what reads them are not moved.
    """
    owner = {node: i for i, nodes in enumerate(found) for node in nodes}
    free: set[fx.Node] = set()
    for node in (node for nodes in found for node in nodes):
        inputs = node.all_input_nodes
        if not ends & {node, *inputs} and all(arg in free or arg not in owner for arg in inputs):
            free.add(node)
    shared = {node for node in free if len({owner.get(user) for user in node.users}) > 2 and not _is_tuple(node)}
    moved = ancestors(list(shared)) & free
    for i, nodes in enumerate(found[1:], start=1):
        found[0] += [node for node in nodes if node in moved]
        found[i] = [node for node in nodes if node not in moved]


def _is_tuple(node: fx.Node) -> bool:
    return any(user.target is operator.getitem for user in node.users)


def _assign(node: fx.Node, number: int, owner: dict[fx.Node, int], found: list[Partition]) -> None:
    """Add `node` to the partition `number`, and before it those of its inputs that are in no partition yet."""
    if node not in owner and node.op == "call_function":
        for arg in node.all_input_nodes:
            _assign(arg, number, owner, found)
        owner[node] = number
        found[number].append(node)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The values that an op changes in place. Ops that read them must not move past it."""
    schema = schema_of(node.target)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    given = [*zip(schema.arguments, node.args, strict=False)]
    given += [(argument, node.kwargs[argument.name]) for argument in schema.arguments if argument.name in node.kwargs]
    found: list[fx.Node] = []
    for argument, value in given:
        if argument.is_write:
            fx.map_arg(value, found.append)
    return found


def _joined(partitions: list[Partition]) -> list[Partition]:
    """Join adjacent partitions that are unique: compiling them separately saves nothing."""
    forms = [_form(nodes)[0] for nodes in partitions]
    count = Counter(forms)
    joined: list[Partition] = []
    for unique, group in groupby(zip(forms, partitions, strict=True), key=lambda each: count[each[0]] == 1):
        members = [nodes for _, nodes in group]
        joined += [[node for nodes in members for node in nodes]] if unique else members
    return joined


def _form(nodes: Partition) -> tuple[Any, list[fx.Node]]:
    """A key that is equal for partitions with the same subgraph, and the nodes outside that this one reads."""
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
    if node.op == "get_attr":  # a constant of the traced graph
        value: Tensor = getattr(node.graph.owning_module, str(node.target))
        return value
    value = node.meta["val"]
    return value
