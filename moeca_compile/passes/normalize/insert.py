"""Insert nodes into a graph: helpers of the normalizing passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moeca_compile.passes.analysis.graph import argument, shape_of

aten = torch.ops.aten


def permutation(node: fx.Node) -> list[int] | None:
    """The input dim behind each dim of `node`, where it only permutes dims; else None."""
    ndim = len(shape_of(node))
    if node.target is aten.permute.default:
        return [dim % ndim for dim in argument(node, 1, "dims")]
    order = list(range(ndim))
    if node.target is aten.t.default:
        return order[::-1]
    if node.target is not aten.transpose.int:
        return None
    one, other = argument(node, 1, "dim0") % ndim, argument(node, 2, "dim1") % ndim
    order[one], order[other] = order[other], order[one]
    return order


class Inserted:
    """Inserts nodes before `anchor`, with its module path and stack trace, and with a fake value like every node."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node) -> None:
        self.graph, self.anchor = graph, anchor

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {
            name: self.anchor.meta[name] for name in ("nn_module_stack", "stack_trace") if name in self.anchor.meta
        }
        values = fx.map_arg((args, kwargs), lambda arg: arg.meta["val"])
        fake_mode = next(arg.meta["val"].fake_mode for arg in (*node.all_input_nodes, self.anchor))
        with torch.no_grad(), fake_mode:
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if node.meta["val"].dtype == dtype else self(aten.to.dtype, node, dtype)

    def permuted(self, node: fx.Node, order: Sequence[int]) -> fx.Node:
        """`node` with its dims in this order; two permutations in a row become one."""
        order = list(order)
        while (before := permutation(node)) is not None:
            order = [before[dim] for dim in order]
            node = node.args[0]  # type: ignore[assignment]
        return node if order == sorted(order) else self(aten.permute.default, node, order)

    def arranged(self, node: fx.Node, have: Sequence[str], want: Sequence[str], sizes: Mapping[str, int]) -> fx.Node:
        """`node`, with dims labeled `have`, brought to dims `want`: permuted, missing ones inserted and expanded."""
        node = self.permuted(node, [have.index(label) for label in want if label in have])
        for dim, label in enumerate(want):
            if label not in have:
                node = self(aten.unsqueeze.default, node, dim)
        shape = [sizes[label] for label in want]
        return node if list(shape_of(node)) == shape else self(aten.expand.default, node, shape)

    def reordered(self, node: fx.Node, have: Sequence[str], want: Sequence[str]) -> fx.Node:
        """As `arranged`, for a value that broadcasts against dims `have`. The result has at least two dims."""
        full = len(have) if list(have) != list(want) else 2
        while len(shape_of(node)) < full:
            node = self(aten.unsqueeze.default, node, 0)
        return node if list(have) == list(want) else self.permuted(node, [have.index(label) for label in want])

    def regrouped(self, node: fx.Node, before: tuple[int, ...], after: tuple[int, ...]) -> fx.Node:
        """A value that broadcasts against `before`, reshaped to do so against `after`; the last two dims agree."""
        if before == after:
            return node
        node = self.reordered(node, "ab", "ab")
        last = shape_of(node)[-2:]
        return self(
            aten.reshape.default, self(aten.expand.default, node, [*before[:-2], *last]), [*after[:-2], *last]
        )
