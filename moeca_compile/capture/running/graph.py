"""What each node of a layer's graph is made of, and whether another call computes it in the same way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.capture.running.trace import Trace
from moeca_compile.capture.running.watch import is_choice, size_by_data


class Graph:
    """A trace's nodes in order.

    made_of_data, made_of_state: what depends on the call's tensors, what on the layer's; neither: a constant
    """

    def __init__(self, trace: Trace, arguments: int) -> None:
        self.values = trace.values
        *self.nodes, self.output = trace.graph.nodes
        # What was computed for nothing tells nothing; but integers and truths the host may have read.
        choices = [node for node in self.nodes if (value := self.tensor(node)) is not None and is_choice(value)]
        read = set(self.before([*self.output.all_input_nodes, *choices]))
        self.nodes = [node for node in self.nodes if node in read or node.op == "placeholder"]
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.arguments, self.state = placeholders[:arguments], placeholders[arguments:]
        self.name_of = dict(zip(self.state, trace.names, strict=True))
        self.made_of_data = self.after(self.arguments)
        self.made_of_state = self.after(self.state)

    def after(self, starts: Iterable[fx.Node]) -> set[fx.Node]:
        """All that is made from these nodes, themselves included."""
        found = set(starts)
        for node in self.nodes:
            if not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found

    def before(self, ends: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> list[fx.Node]:
        """All that these nodes are made from, themselves included, in order; without `stop` and what is beyond it."""
        met, pending = set(stop), list(ends)
        found = set()
        while pending:
            node = pending.pop()
            if node not in met:
                met.add(node)
                found.add(node)
                pending.extend(node.all_input_nodes)
        return [node for node in self.nodes if node in found]

    def of_state_alone(self, node: fx.Node) -> bool:
        return node in self.made_of_state and node not in self.made_of_data

    def tensor(self, node: fx.Node) -> Tensor | None:
        value = self.values.get(node)
        return value if isinstance(value, Tensor) else None

    def varies(self, node: fx.Node) -> str | None:
        """Why another call may not compute a node in the same way; None where it does, as soon as its inputs do."""
        if node.op == "get_attr":
            fresh = all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)
            return None if fresh else "a tensor that is neither its parameter, nor its buffer, nor an argument"
        if node.op != "call_function":
            return None
        args = fx.map_arg(node.args, lambda each: self.values[each])
        by_data = size_by_data(node.target, args) or _fills_by_mask(node, args)
        return "a tensor whose size the data say" if by_data else None


def _fills_by_mask(node: fx.Node, args: Any) -> bool:
    """`x[mask] = y`, where y has as many rows as the mask says."""
    if node.target is not torch.ops.aten.index_put.default or args[2].numel() == 1:
        return False
    return any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1])
