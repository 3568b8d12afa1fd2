"""Replace top-k and scatter over a short last dim, as routers have them, by ops that Inductor fuses.

    values, index = topk(scores, 2)             comparisons and two argmax over the experts' scores, sorted
    scatter(zeros, -1, index, 1.0)              where((index[..., None, :] == arange(n)[:, None]).any(-1), 1.0, zeros)

For CUDA alone: there each of these ops is two kernels of their own, and on a CPU they are faster as they are. The ops
themselves decide, so any router profits, and whatever else chooses from few.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from moeca_compile.lower.inlined import insert_traced
from moeca_compile.ops import selection
from moeca_compile.ops.aten import aten
from moeca_compile.passes.analysis.graph import argument, shape_of

_WIDEST = 256
"""Most columns. Inductor holds so many in one block, so that all rounds are one kernel."""

_MOST = 8
"""Most rounds of a top-k, and most marks a row. Each round is compiled anew."""


def fuse_selections(graph: fx.Graph) -> int:
    """Rewrite a traced step in place; returns the number of ops replaced."""
    topks = [node for node in graph.find_nodes(op="call_function", target=aten.topk.default) if is_short_topk(node)]
    scatters = [node for node in graph.find_nodes(op="call_function", target=aten.scatter.value) if _marks(node)]
    for node in topks:
        x, k = node.args[:2]
        _replace_results(node, insert_traced(graph, node, selection.topk, x, k))
    for node in scatters:
        base, _, index, value = node.args
        (result,) = insert_traced(graph, node, selection.mark, base, index, value)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    if topks or scatters:
        graph.eliminate_dead_code()
    return len(topks) + len(scatters)


def is_short_topk(node: fx.Node) -> bool:
    """Whether it takes the few greatest of the last dim, of floats on CUDA with few columns."""
    x, k = argument(node, 0, "self"), argument(node, 1, "k")
    dim, largest = argument(node, 2, "dim", -1), argument(node, 3, "largest", True)
    unpacked = all(user.target is operator.getitem for user in node.users)
    return unpacked and bool(largest) and 1 <= k <= _MOST and _short(x, dim)


def _marks(node: fx.Node) -> bool:
    base, dim, index, value = (argument(node, i, name) for i, name in enumerate(("self", "dim", "index", "value")))
    if not isinstance(value, (int, float)) or not _short(base, dim):
        return False
    *rows, count = shape_of(index) or (0,)
    return 1 <= count <= _MOST and rows == list(shape_of(base)[:-1])


def _short(node: fx.Node, dim: int) -> bool:
    """Whether `dim` is the last one of floats on CUDA, with few columns."""
    shape = shape_of(node)
    return bool(shape) and dim in (-1, len(shape) - 1) and shape[-1] <= _WIDEST and _on_cuda_float(node)


def _on_cuda_float(node: Any) -> bool:
    value: Tensor = node.meta["val"]
    return value.device.type == "cuda" and value.is_floating_point()


def _replace_results(node: fx.Node, results: tuple[fx.Node, ...]) -> None:
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        node.graph.erase_node(user)
    node.graph.erase_node(node)
