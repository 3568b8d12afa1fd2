"""Write a fused multiply-add as a product and a sum, the form in which gated residuals are matched.

Before:  h = addcmul(x, gate, y, value=v)
After:   h = add(x, mul(gate, y), alpha=v)
"""

from __future__ import annotations

import torch
from torch import fx

from moeca_compile.passes.normalize.insert import Inserted

aten = torch.ops.aten


def split_products_from_sums(graph: fx.Graph) -> int:
    """Rewrite fused multiply-adds in place; returns how many."""
    changed = 0
    for node in list(graph.nodes):
        if node.target is aten.addcmul.default:
            new = Inserted(graph, node)
            scale = node.kwargs.get("value", 1)
            options = {} if scale == 1 else {"alpha": scale}
            added = new(aten.add.Tensor, node.args[0], new(aten.mul.Tensor, *node.args[1:3]), **options)
            node.replace_all_uses_with(added)
            graph.erase_node(node)
            changed += 1
    return changed
