"""Remove every dropout that drops nothing, as all do in eval mode.

Before:  y = dropout(x, 0.1, False)
After:   x in place of y
"""

from __future__ import annotations

import torch
from torch import fx

from moeca_compile.passes.analysis.graph import argument

aten = torch.ops.aten


def drop_idle_dropouts(graph: fx.Graph) -> int:
    """Remove idle dropouts in place; returns how many."""
    changed = 0
    for node in list(graph.nodes):
        if node.target is aten.dropout.default and not (argument(node, 1, "p") and argument(node, 2, "train")):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            changed += 1
    return changed
