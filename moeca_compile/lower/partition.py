"""Cut a step's graph along its residual stream, so that stretches that are alike are compiled once.

The blocks of a transformer differ in their parameters and caches only. Aliases, which the evaluation of a step
leaves on the residual stream, cut the traced graph into stretches. Each becomes a graph of its own, with all that
it reads as inputs; stretches that are equal but for what they are given share one such graph, a *unit*.
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
Stretch = list[fx.Node]


@dataclass(eq=False)
class Unit:
    """What all stretches of one form have in common, written with the nodes of the first of them.

    outputs: the positions in `nodes` of the values that some stretch of this form hands on.
    """

    nodes: Stretch
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
    """One stretch of the graph: its unit, what that is given, and the nodes whose values the unit returns."""

    unit: Unit
    arguments: list[fx.Node]
    nodes: Stretch

    @property
    def results(self) -> list[fx.Node]:
        return [self.nodes[i] for i in sorted(self.unit.outputs)]


def outline(gm: fx.GraphModule) -> list[Call]:
    """The graph as calls of units, in order. Its boundaries are taken out of it."""
    return _calls(_joined(_stretches(gm.graph)))


def uncut(gm: fx.GraphModule) -> list[Call]:
    """The graph as one call. Its boundaries are taken out of it."""
    return _calls([[node for nodes in _stretches(gm.graph) for node in nodes]])


def _calls(stretches: list[Stretch]) -> list[Call]:
    home = {node: i for i, nodes in enumerate(stretches) for node in nodes}
    units: dict[Any, Unit] = {}
    calls = []
    for i, nodes in enumerate(stretches):
        form, arguments = _form(nodes)
        unit = units.setdefault(form, Unit(nodes, arguments))
        unit.outputs |= {p for p, node in enumerate(nodes) if any(home.get(user) != i for user in node.users)}
        calls.append(Call(unit, arguments, nodes))
    return calls


def _stretches(graph: fx.Graph) -> list[Stretch]:
    """The graph's ops from one boundary to the next.

    What follows the last one is for the most part what the policy keeps of each block. It goes back to the stretch
    that it was computed in, so that this need not hand on everything that is kept; what is made of many stretches,
    such as all layers' counters, stays behind them all, or the last block would not be like the others.
    """
    found: list[Stretch] = [[]]
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
            _settle(node, max(ready), home, found)
    for node in tail:
        _settle(node, len(found) - 1, home, found)
    return [nodes for nodes in found if nodes]


def _hoist_shared(found: list[Stretch], ends: set[fx.Node]) -> None:
    """Move what comes of the inputs alone, and more than two stretches read, to the front: the first block, where the
    conditioning of all blocks happens to be computed, would not be like the others. Not past `ends`: the stream, and
    what is changed in place."""
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


def _settle(node: fx.Node, place: int, home: dict[fx.Node, int], found: list[Stretch]) -> None:
    """Give `node` a home, and before it those of its inputs that have none: they can be computed anywhere."""
    if node not in home and node.op == "call_function":
        for arg in node.all_input_nodes:
            _settle(arg, place, home, found)
        home[node] = place
        found[place].append(node)


def _changed_in_place(graph: fx.Graph) -> set[fx.Node]:
    """The values that some op of the graph writes to; what reads them must keep its place."""
    return {
        arg
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for arg in node.all_input_nodes
    }


def _joined(stretches: list[Stretch]) -> list[Stretch]:
    """Neighbors of which none has its like elsewhere become one: nothing is gained by compiling them apart."""
    forms = [_form(nodes)[0] for nodes in stretches]
    count = Counter(forms)
    joined: list[Stretch] = []
    for alone, group in groupby(zip(forms, stretches, strict=True), key=lambda each: count[each[0]] == 1):
        members = [nodes for _, nodes in group]
        joined += [[node for nodes in members for node in nodes]] if alone else members
    return joined


def _form(nodes: Stretch) -> tuple[Any, list[fx.Node]]:
    """All that has to be equal for two stretches to be the same graph, and what this one reads from outside."""
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
