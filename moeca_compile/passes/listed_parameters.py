"""Leave inputs that only stand in markers' lists out of tracing: the parameters of the experts after the first.

Before: moeca::experts_fixed_k(x, index, weight, body_out, [a0, b0, a1, b1, a2, b2], 3), with six inputs of the graph.
While traced: moeca::experts_fixed_k(x, index, weight, body_out, [a0, b0], 3), with two; then as before.

There may be thousands of them, and tracing takes longer for an input than for a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

_PARAMS, _NUM_EXPERTS = 4, 5  # where a marker has its parameters and the number of its experts


@dataclass(frozen=True)
class ListedParameters:
    """What to leave out of a graph, and where it belongs.

    placeholders: the inputs of the graph, in order; count: how many markers it has
    markers: those whose lists are cut, by their place among all, with the whole lists
    kept: positions of the inputs that are traced
    """

    placeholders: list[fx.Node]
    count: int
    markers: dict[int, tuple[fx.Node, list[fx.Node]]]
    kept: list[int]

    @classmethod
    def of(cls, graph: fx.Graph) -> ListedParameters | None:
        """None where there is nothing to leave out."""
        placeholders = graph.find_nodes(op="placeholder")
        everyone = _markers(graph)
        markers = {i: (node, _params(node)) for i, node in enumerate(everyone) if _lists_inputs(node)}
        firsts = {param for marker, params in markers.values() for param in params[: _own(marker)]}
        listed = {param for _, params in markers.values() for param in params} - firsts
        users = {marker for marker, _ in markers.values()}
        left_out = {p for p in listed if users.issuperset(p.users) and "example_value" in p.meta}
        kept = [position for position, node in enumerate(placeholders) if node not in left_out]
        return cls(placeholders, len(everyone), markers, kept) if left_out else None

    def left_out_of(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A copy of the graph in which the markers list the parameters of expert 0 alone."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(gm.graph, copies)
        graph.output(output)
        for marker, params in self.markers.values():
            copies[marker].update_arg(_PARAMS, [copies[param] for param in params[: _own(marker)]])
        kept = {self.placeholders[position] for position in self.kept}
        for node in self.placeholders:
            if node not in kept:
                graph.erase_node(copies[node])
        return fx.GraphModule(gm, graph)

    def put_back(self, exported: fx.GraphModule) -> fx.GraphModule | None:
        """The exported graph with all inputs and whole lists; None where export has dropped a marker."""
        markers = _markers(exported.graph)
        if len(markers) != self.count:
            return None
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        traced = iter(exported.graph.find_nodes(op="placeholder"))
        kept, whole = set(self.kept), []
        for position, node in enumerate(self.placeholders):
            whole.append(graph.placeholder(node.name))
            if position in kept:
                copies[next(traced)] = whole[-1]
            else:
                whole[-1].meta["val"] = node.meta["example_value"]
        for node in exported.graph.nodes:
            if node in copies:
                copies[node].meta.update(node.meta)
            elif node.op != "output":
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(fx.map_arg(exported.graph.output_node().args[0], copies.__getitem__))
        beside = dict(zip(self.placeholders, whole, strict=True))
        for place, (_, params) in self.markers.items():
            copies[markers[place]].update_arg(_PARAMS, [beside[param] for param in params])
        result = fx.GraphModule(exported, graph)
        result.meta["mutated_inputs"] = tuple(self.kept[p] for p in exported.meta["mutated_inputs"])
        return result


def _markers(graph: fx.Graph) -> list[fx.Node]:
    wanted = (torch.ops.moeca.experts_fixed_k, torch.ops.moeca.experts_variable_k)
    return [node for node in graph.nodes if getattr(node.target, "overloadpacket", node.target) in wanted]


def _params(marker: fx.Node) -> list[fx.Node]:
    return list(marker.args[_PARAMS])  # type: ignore[arg-type]


def _own(marker: fx.Node) -> int:
    """How many parameters one expert has."""
    experts = marker.args[_NUM_EXPERTS]
    assert isinstance(experts, int)
    return len(_params(marker)) // experts


def _lists_inputs(marker: fx.Node) -> bool:
    """Whether the parameters after those of expert 0 are inputs of the graph, and not made from them."""
    return all(param.op == "placeholder" for param in _params(marker)[_own(marker) :])
