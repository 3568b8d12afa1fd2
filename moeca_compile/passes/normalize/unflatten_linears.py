"""A linear between a flattening view and its inverse runs on the unflattened rows.

Before:  y = view(linear(view(x, [N * B, D]), w, b), [N, B, E])
After:   y = linear(reshape(x, [N, B, D]), w, b)

Otherwise samples and tokens would share one dim in between, in either order.
"""

from __future__ import annotations

import torch
from torch import fx

from moeca_compile.ops.aten import VIEWS
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.normalize.insert import Inserted

aten = torch.ops.aten


def unflatten_linears(graph: fx.Graph) -> int:
    """Rewrite these linears in place; returns how many."""
    changed = 0
    for node in list(graph.nodes):
        linear = node.args[0] if node.target in VIEWS else None
        if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default or len(linear.users) > 1:
            continue
        flat, *weights = linear.args
        if not isinstance(flat, fx.Node) or flat.target not in VIEWS or shape_of(node)[-1] != shape_of(linear)[-1]:
            continue
        rows = Inserted(graph, node)(aten.reshape.default, flat.args[0], [*shape_of(node)[:-1], shape_of(flat)[-1]])
        node.target, node.args = aten.linear.default, (rows, *weights)
        changed += 1
    return changed
