"""A stream whose tokens lie in a grid, (batch, height, width, channels), becomes one of (batch, tokens, channels).

Before:  h = layer_norm(x);  y = add(x, mul(gate, view(attention, [B, H, W, C])))       x (B, H, W, C)
After:   flat = reshape(x, [B, H * W, C]);  h = layer_norm(flat)
         y = add(flat, mul(reshape(gate, [B, 1, C]), reshape(attention, [B, H * W, C])))

From each such stream on, and from each view in its shape, the ops that treat tokens alike run on flat values. What is
no such op, a convolution or a shift of the grid, reads a view in the grid's shape. Any number of dims may lie between
samples and channels.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from moeca_compile.ops.aten import NORMS, SDPA, SOFTMAXES, VIEWS
from moeca_compile.ops.markers import MARKERS
from moeca_compile.passes.analysis.graph import argument, is_pointwise, shape_of
from moeca_compile.passes.match.residuals import residuals_around
from moeca_compile.passes.normalize.insert import Inserted

aten = torch.ops.aten

_ALONG_LAST = SOFTMAXES | {aten.slice.Tensor}
"""Ops whose second argument is a dim; they are row-wise where that is the last one."""
_REDUCING = frozenset({aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default})


def flatten_streams(graph: fx.Graph) -> int:
    """Rewrite such streams, and what is computed from them token by token, in place; returns how many nodes."""
    anchors = [node for node in graph.nodes if node.target is SDPA or node.target in MARKERS]
    streams = {residual.stream for each in anchors for residual in residuals_around(each)}
    streams = {each for each in streams if len(shape_of(each)) > 3}
    if not streams:
        return 0
    flattened, grids = _Flattened(graph), {shape_of(each)[:-1] for each in streams}
    for node in list(graph.nodes):
        is_view = node.target in VIEWS and shape_of(node)[:-1] in grids  # what attention or experts return
        flattened.visit(node, is_view or node in streams)
    for node in graph.nodes:
        if node.target in VIEWS and node.args[0] in flattened.flat:
            node.target = aten.reshape.default
            node.args = (flattened.flat[node.args[0]], list(shape_of(node)))
    return flattened.count


class _Flattened:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.count = graph, 0
        self.flat: dict[fx.Node, fx.Node] = {}

    def visit(self, node: fx.Node, starts: bool) -> None:
        given = self.arguments(node)
        if given is not None:
            self.replace(node, *given)
        elif starts:
            insert = Inserted(self.graph, node.next)
            flat = self.flat_of(node, shape_of(node)[:-1], insert)
            view = insert(aten.reshape.default, flat, list(shape_of(node)))  # so that all readers read the flat value
            node.replace_all_uses_with(view, lambda user: user is not flat and user is not view)
            self.flat[view] = flat

    def arguments(self, node: fx.Node) -> tuple[list[Any], dict[str, Any]] | None:
        """The arguments with which an op of flat values computes what the node does; None where none would."""
        leads = {shape_of(each)[:-1] for each in node.all_input_nodes if each in self.flat}
        if len(leads) != 1 or shape_of(node)[:-1] != (lead := leads.pop()):
            return None
        args, kwargs, last = list(node.args), dict(node.kwargs), len(lead)
        insert = Inserted(self.graph, node)
        if is_pointwise(node.target):
            args, kwargs = fx.map_arg((args, kwargs), lambda each: self.flat_of(each, lead, insert))
            return list(args), dict(kwargs)
        if any(each in self.flat for each in node.all_input_nodes if each is not args[0]):
            return None
        if node.target in NORMS:
            row_wise = len(argument(node, 1, "normalized_shape")) == 1
        elif node.target in _ALONG_LAST or node.target in _REDUCING:
            dims = argument(node, 1, "dim")
            row_wise = dims in (-1, last, [-1], [last])
            if row_wise:
                args[1:2] = [-1 if isinstance(dims, int) else [-1]]
                kwargs.pop("dim", None)
        else:
            row_wise = node.target is aten.linear.default
        args[0] = self.flat.get(node.all_input_nodes[0])
        return (args, kwargs) if row_wise and args[0] is not None else None

    def flat_of(self, node: fx.Node, lead: tuple[int, ...], insert: Inserted) -> fx.Node:
        """A value that aligns with (*lead, width), as one that aligns with (samples, tokens, width)."""
        if node in self.flat:
            return self.flat[node]
        shape = shape_of(node)
        if len(shape) < 2:
            return node
        shape = (1,) * (len(lead) + 1 - len(shape)) + shape
        between, samples, width = shape[1:-1], shape[0], shape[-1]
        if between == lead[1:] or set(between) == {1}:
            size = [samples, prod(between), width]
            node = node.args[0] if node.target in VIEWS else node  # type: ignore[assignment]
            return node if list(shape_of(node)) == size else insert(aten.reshape.default, node, size)
        whole = insert(aten.expand.default, node, [samples, *lead[1:], width])
        return insert(aten.reshape.default, whole, [samples, -1, width])

    def replace(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> None:
        flat = Inserted(self.graph, node)(node.target, *args, **kwargs)
        view = Inserted(self.graph, node)(aten.reshape.default, flat, list(shape_of(node)))
        node.replace_all_uses_with(view)
        self.flat[view] = flat
        self.count += 1
