"""The parts of a split are slices.

Before:  parts = split_with_sizes(x, [16, 8], 1);  image = getitem(parts, 0);  text = getitem(parts, 1)
After:   image = slice(x, 1, 0, 16);  text = slice(x, 1, 16, 24)

Matching then knows one way only to cut tokens off a longer sequence.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from moeca_compile.ops.aten import SPLITS

aten = torch.ops.aten


def split_to_slices(graph: fx.Graph) -> int:
    """Rewrite the parts of splits in place; returns how many."""
    changed = 0
    for node in list(graph.nodes):
        if node.target is operator.getitem and node.args[0].target in SPLITS:
            split, part = node.args
            dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
            sizes = [value.shape[dim] for value in split.meta["val"]]
            start = sum(sizes[:part])
            node.target, node.args = aten.slice.Tensor, (split.args[0], dim, start, start + sizes[part])
            changed += 1
    return changed
