"""Drop operands of which only the shape, the dtype and the device are read: these are known.

Before:  y = type_as(attended, query);     z = new_zeros(y, [B, N, D]);    c = copy(z, x)
After:   y = to(attended, query's dtype);  z = full([B, N, D], 0);         c = to(x, z's dtype)

The value does not depend on such an operand. Left in the graph, its tokens would count as read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from moeca_compile.passes.analysis.graph import argument, shape_of
from moeca_compile.passes.normalize.insert import Inserted

aten = torch.ops.aten

Rewrite = Callable[[fx.Node, Inserted], "fx.Node | None"]


def drop_unread_operands(graph: fx.Graph) -> int:
    """Rewrite these ops in place; returns how many."""
    changed = 0
    for node in list(graph.nodes):
        rewrite = _REWRITES.get(node.target)
        result = rewrite(node, Inserted(graph, node)) if rewrite else None
        if result is not None:
            node.replace_all_uses_with(result)
            graph.erase_node(node)
            changed += 1
    return changed


def _cast(node: fx.Node, new: Inserted) -> fx.Node:
    source, value = node.args[0], node.meta["val"]
    assert isinstance(source, fx.Node)
    if source.meta["val"].device != value.device:
        return new(aten.to.device, source, value.device, value.dtype)
    return new.cast(source, value.dtype)


def _copied(node: fx.Node, new: Inserted) -> fx.Node:
    source, value = node.args[1], node.meta["val"]
    assert isinstance(source, fx.Node)
    copy = new(aten._to_copy.default, source, dtype=value.dtype, device=value.device)
    return copy if shape_of(copy) == shape_of(node) else new(aten.expand.default, copy, list(shape_of(node)))


def _filled(value_of: Callable[[fx.Node], object]) -> Rewrite:
    """A constant: like the operand where it has that shape, since an expert's body runs on any number of rows."""

    def rewrite(node: fx.Node, new: Inserted) -> fx.Node | None:
        like, fill, value = node.args[0], value_of(node), node.meta["val"]
        if isinstance(fill, fx.Node):
            return None
        assert isinstance(like, fx.Node)
        options = {"dtype": value.dtype, "device": value.device}
        if shape_of(like) == shape_of(node):
            return new(aten.full_like.default, like, fill, **options)
        return new(aten.full.default, list(shape_of(node)), fill, **options)

    return rewrite


_REWRITES: dict[object, Rewrite] = {
    aten.type_as.default: _cast,
    aten.copy.default: _copied,
    aten.new_zeros.default: _filled(lambda node: 0),
    aten.new_ones.default: _filled(lambda node: 1),
    aten.new_full.default: _filled(lambda node: argument(node, 2, "fill_value")),
    aten.fill.Scalar: _filled(lambda node: argument(node, 1, "value")),
}
