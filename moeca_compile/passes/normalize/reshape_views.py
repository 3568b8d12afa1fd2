"""Write every view as a reshape: a value that comes from a cache may lie in memory in another order.

Before:  y = view(x, [N, D])
After:   y = reshape(x, [N, D])
"""

from __future__ import annotations

import torch
from torch import fx

from moeca_compile.ops.aten import VIEWS

aten = torch.ops.aten


def reshape_views(graph: fx.Graph) -> None:
    """Write every view as a reshape: a value that comes from a cache may lie in memory in another order.

    Before:  y = view(x, [N, D])
    After:   y = reshape(x, [N, D])
    """
    for node in graph.nodes:
        if node.target in VIEWS:
            node.target = aten.reshape.default
