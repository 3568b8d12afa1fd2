"""Write every view as a reshape, since a value from a cache may have other strides than the model's own.

Before:  y = view(x, [N, D])
After:   y = reshape(x, [N, D])
"""

from __future__ import annotations

import torch
from torch import fx

from moeca_compile.ops.aten import VIEWS

aten = torch.ops.aten


def reshape_views(graph: fx.Graph) -> int:
    """Rewrite views in place; returns how many."""
    changed = 0
    for node in graph.nodes:
        if node.target in VIEWS and node.target is not aten.reshape.default:
            node.target = aten.reshape.default
            changed += 1
    return changed
