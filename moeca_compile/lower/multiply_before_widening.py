"""Multiply 16-bit values as they are, with a result in float32, where a model widens them first.

    linear(x.float(), weight.float())           mm(x, weight.t(), out_dtype=float32)

Routers do so. The product of two 16-bit values is exact in float32, and the sums are in float32 either way, so both
are the same up to the order of the sums. But the second runs on tensor cores, reads half the bytes, and neither rows
nor weights are widened in memory. For CUDA alone: `mm.dtype` has no other kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.lower.inlined import insert_traced
from moeca_compile.ops.aten import aten
from moeca_compile.passes.analysis.graph import argument, dtype_of

_NARROW = (torch.bfloat16, torch.float16)


def multiply_before_widening(graph: fx.Graph) -> int:
    """Rewrite a traced step in place; returns the number of products replaced."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        x, weight = (_before_widening(each) for each in node.args[:2])
        if x is None or weight is None or argument(node, 2, "bias") is not None or dtype_of(x) != dtype_of(weight):
            continue
        (product,) = insert_traced(graph, node, _product, x, weight)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        count += 1
    if count:
        graph.eliminate_dead_code()
    return count


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K), weight (N, K) -> (..., N) in float32."""
    rows = aten.mm.dtype(x.reshape(-1, x.shape[-1]), weight.t(), torch.float32)
    return rows.reshape(*x.shape[:-1], weight.shape[0])


def _before_widening(node: Any) -> fx.Node | None:
    """The 16-bit value on CUDA of which this is the float32 copy; None if it is none."""
    if node.target is not aten._to_copy.default or node.kwargs != {"dtype": torch.float32}:
        return None
    source: fx.Node = node.args[0]
    return source if dtype_of(source) in _NARROW and _on_cuda(source) else None


def _on_cuda(node: fx.Node) -> bool:
    value: Tensor = node.meta["val"]
    return value.device.type == "cuda"
