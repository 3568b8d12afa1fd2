"""A view of a view becomes one view of the first value.

Before:  flat = view(choice, [T * k]);  index = view(flat, [T, k])
After:   index = view(choice, [T, k])

Dispatch code flattens a router's (T, k) choice and unflattens it again. In between, one dim holds both tokens and
slots, and the token-axis analysis would lose the tokens there.
"""

from __future__ import annotations

import torch
from torch import fx

from moeca_compile.ops.aten import VIEWS
from moeca_compile.passes.analysis.graph import shape_of

aten = torch.ops.aten


def collapse_views(graph: fx.Graph) -> int:
    """Rewrite chains of views in place; returns how many views now skip another one."""
    changed = 0
    for node in graph.nodes:
        if node.target in VIEWS and node.args[0].target in VIEWS:
            node.target = aten.reshape.default
            node.args = (node.args[0].args[0], list(shape_of(node)))
            changed += 1
    return changed
