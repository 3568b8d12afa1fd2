"""Export without the parameters of all experts but the first, which only markers list.

Before: moeca::experts_fixed_k(x, index, weight, body_out, [a0, b0, a1, b1, a2, b2], 3), with six inputs of the graph.
While traced: moeca::experts_fixed_k(x, index, weight, body_out, [a0, b0], 3), with two; then as before.

There may be thousands of such inputs, and tracing an input takes longer than tracing a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

_PARAMS, _NUM_EXPERTS = 4, 5  # positions of a marker's arguments `params` and `num_experts`


@dataclass(frozen=True)
class ListedParameters:
    """The parameters to leave out of a graph, and where to restore them.

    Attributes:
        placeholders: the inputs of the graph, in order.
        count: how many markers the graph has.
        markers: the markers whose lists are shortened, by their index among all, each with its whole list.
        traced: positions of the inputs that are traced.
    """

    placeholders: list[fx.Node]
    count: int
    markers: dict[int, tuple[fx.Node, list[fx.Node]]]
    traced: list[int]

    @classmethod
    def of(cls, graph: fx.Graph) -> ListedParameters | None:
        """None where there is nothing to leave out."""
        placeholders = graph.find_nodes(op="placeholder")
        all_markers = _markers(graph)
        markers = {i: (node, _params(node)) for i, node in enumerate(all_markers) if _lists_inputs(node)}
        firsts = {param for marker, params in markers.values() for param in params[: _own(marker)]}
        listed = {param for _, params in markers.values() for param in params} - firsts
        users = {marker for marker, _ in markers.values()}
        left_out = {p for p in listed if users.issuperset(p.users) and "example_value" in p.meta}
        traced = [position for position, node in enumerate(placeholders) if node not in left_out]
        return cls(placeholders, len(all_markers), markers, traced) if left_out else None

    def removed_from(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A copy of the graph without these inputs: the markers list the parameters of expert 0 alone."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(gm.graph, copies)
        graph.output(output)
        for marker, params in self.markers.values():
            copies[marker].update_arg(_PARAMS, [copies[param] for param in params[: _own(marker)]])
        traced = {self.placeholders[position] for position in self.traced}
        for node in self.placeholders:
            if node not in traced:
                graph.erase_node(copies[node])
        return fx.GraphModule(gm, graph)

    def restored_to(self, exported: fx.GraphModule) -> fx.GraphModule | None:
        """The exported graph with all inputs and whole lists; None where export dropped a marker."""
        markers = _markers(exported.graph)
        if len(markers) != self.count:
            return None
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        exported_inputs = iter(exported.graph.find_nodes(op="placeholder"))
        traced, inputs = set(self.traced), []
        for position, node in enumerate(self.placeholders):
            inputs.append(graph.placeholder(node.name))
            if position in traced:
                copies[next(exported_inputs)] = inputs[-1]
            else:
                inputs[-1].meta["val"] = node.meta["example_value"]
        for node in exported.graph.nodes:
            if node in copies:
                copies[node].meta.update(node.meta)
            elif node.op != "output":
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(fx.map_arg(exported.graph.output_node().args[0], copies.__getitem__))
        restored = dict(zip(self.placeholders, inputs, strict=True))
        for index, (_, params) in self.markers.items():
            copies[markers[index]].update_arg(_PARAMS, [restored[param] for param in params])
        result = fx.GraphModule(exported, graph)
        result.meta["mutated_inputs"] = tuple(self.traced[p] for p in exported.meta["mutated_inputs"])
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
    """Whether the parameters of the experts after the first are inputs of the graph, not computed from inputs."""
    return all(param.op == "placeholder" for param in _params(marker)[_own(marker) :])
