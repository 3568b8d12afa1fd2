"""A layer's graph without computations on some rows: those run on all rows, and a mask picks what is kept.

    at = where(mask)[0]                          score = rows @ centres.T
    score = rows[at] @ centres.T         ->      top = score.topk(k).indices
    index[at] = score.topk(k).indices            index = where(mask[:, None], top, index)

For masks by what the call brings, such as labels, and not by the layer's parameters, as those of routed rows are.
Values tell, node by node, whether what was computed on the picked rows is what comes out on all of them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.capture.numerics import close
from moeca_compile.capture.running.graph import Graph
from moeca_compile.capture.running.trace import Trace

_aten = torch.ops.aten
_PICKS = (_aten.where.default, _aten.nonzero.default)
_PUTS = (_aten.index_put.default, _aten.index_add.default, _aten.index_copy.default)


@dataclass(frozen=True)
class _Mask:
    """A mask of rows, (N,)."""

    node: fx.Node
    value: Tensor

    def picked(self, value: Tensor) -> Tensor:
        """Rows of what was computed on all rows, which may have several rows for each of the mask's."""
        each = len(value) // len(self.value)
        return value.reshape(len(self.value), each, *value.shape[1:])[self.value].flatten(0, 1)


@dataclass(frozen=True)
class _Rows:
    """What stands for a tensor of picked rows: the same on all rows, (N, ...)."""

    node: fx.Node
    value: Any
    mask: _Mask


def on_all_rows(graph: Graph, trace: Trace, tolerance: float) -> Trace | None:
    """The same computation; None where nothing is put back among all rows by a mask of the call's own."""
    found = _Dense(graph, tolerance)
    return found.trace(trace) if found.put else None


class _Dense:
    def __init__(self, graph: Graph, tolerance: float) -> None:
        self.graph, self.tolerance = graph, tolerance
        self.made = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.rows: dict[fx.Node, _Rows] = {}
        self.put = False
        for node in graph.nodes:
            self.visit(node)
        self.made.output(fx.map_arg(graph.output.args[0], self.copies.__getitem__))
        self.made.eliminate_dead_code()

    def trace(self, old: Trace) -> Trace:
        return Trace(self.made, old.names, self.values)

    def visit(self, node: fx.Node) -> None:
        copied = self.made.node_copy(node, self.copies.__getitem__)
        self.copies[node], self.values[copied] = copied, self.graph.values.get(node)
        if node.op != "call_function":
            return
        try:
            mask = self.mask_of(node)
            if mask is not None and node.target in _PUTS:
                self.put_back(node, mask)
            elif mask is not None:
                self.compute(node, mask)
        except Exception:  # an op's, which takes no other sizes: it stays as it is
            return

    def mask_of(self, node: fx.Node) -> _Mask | None:
        """The mask by which a node's inputs are picked, or by which it picks."""
        masks = [self.rows[each].mask for each in node.all_input_nodes if each in self.rows]
        masks += [self.own_mask(each) for each in _indices(node) if each is not None and self.is_mask(each)]
        if not masks or any(not torch.equal(each.value, masks[0].value) for each in masks):
            return None
        return masks[0]

    def is_mask(self, node: fx.Node) -> bool:
        value = self.graph.tensor(node)
        by_call = node in self.graph.made_of_data and node not in self.graph.made_of_state
        return by_call and value is not None and value.dim() == 1 and value.dtype == torch.bool

    def own_mask(self, node: fx.Node) -> _Mask:
        return _Mask(self.copies[node], self.graph.values[node])

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = self.made.call_function(op, args, kwargs)
        given = fx.map_arg((args, kwargs), self.values.__getitem__)
        self.values[made] = op(*given[0], **given[1])
        return made

    def compute(self, node: fx.Node, mask: _Mask) -> None:
        """The node on all rows, if that gives the values of the picked ones."""
        args, kwargs = self.on_all(node, mask)
        if node.target in _PICKS:
            made = self.every_row(mask)
            made = self.call(_aten.unsqueeze.default, made, 1) if node.target is _aten.nonzero.default else made
            value: Any = [self.values[made]] if node.target is _aten.where.default else self.values[made]
        elif node.target is _aten.index.Tensor and any(self.is_own(each) for each in _indices(node)):
            made = args[0]
            value = self.values[made]
        elif node.target is operator.getitem:
            whole = self.rows[node.all_input_nodes[0]]
            listed = isinstance(whole.value, list) and isinstance(self.values[whole.node], Tensor)
            made = whole.node if listed else self.call(node.target, whole.node, node.args[1])
            value = self.values[made]
        else:
            made = self.call(node.target, *args, **kwargs)
            value = self.values[made]
        if self.same(value, self.graph.values[node], mask):
            self.rows[node] = _Rows(made, value, mask)

    def is_own(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and self.is_mask(node)

    def put_back(self, node: fx.Node, mask: _Mask) -> None:
        """Rows that are put among all rows: there by the mask, and else what was there before."""
        before = node.args[0]
        if not isinstance(before, fx.Node) or before in self.rows:
            return
        whole = self.graph.values[before]
        if node.target is _aten.index_put.default and self.is_own(node.args[1][0]):  # type: ignore[index]
            new = self.on_all(node, mask)[0][2]
            if self.values[new].dim() >= whole.dim() and self.values[new].numel() != whole.numel():
                return
            if self.values[new].numel() == whole.numel():
                new = self.call(_aten.reshape.default, new, list(whole.shape))
        else:
            args, kwargs = self.on_all(node, mask)
            new = self.call(node.target, *args, **kwargs)
        shaped = self.call(_aten.reshape.default, mask.node, [-1] + [1] * (whole.dim() - 1))
        made = self.call(_aten.where.self, shaped, new, self.copies[before])
        if close(self.values[made], self.graph.values[node], self.tolerance):
            self.copies[node], self.put = made, True

    def every_row(self, mask: _Mask) -> fx.Node:
        return self.call(_aten.arange.default, len(mask.value), device=mask.value.device)

    def on_all(self, node: fx.Node, mask: _Mask) -> tuple[list[Any], dict[str, Any]]:
        """The node's arguments on all rows: other tensors, and sizes that begin with other numbers."""
        some, all_of = int(mask.value.sum()), len(mask.value)

        def resized(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                return self.rows[arg].node if arg in self.rows else self.copies[arg]
            if isinstance(arg, (list, tuple)) and arg and all(type(each) is int for each in arg):
                grows = some and arg[0] > 0 and arg[0] % some == 0 and len(arg) > 1
                return [arg[0] // some * all_of, *arg[1:]] if grows else list(arg)
            return [resized(each) for each in arg] if isinstance(arg, (list, tuple)) else arg

        return [resized(arg) for arg in node.args], {key: resized(arg) for key, arg in node.kwargs.items()}

    def same(self, value: Any, picked: Any, mask: _Mask) -> bool:
        if isinstance(picked, (tuple, list)):
            return len(value) == len(picked) and all(
                self.same(a, b, mask) for a, b in zip(value, picked, strict=True)
            )
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) % len(mask.value):
            return False
        got = mask.picked(value)
        if got.shape != picked.shape or got.dtype != picked.dtype:
            return False
        return close(got, picked, self.tolerance) if got.dtype.is_floating_point else torch.equal(got, picked)


def _indices(node: fx.Node) -> list[Any]:
    """The tensors by which a node picks or puts rows."""
    if node.target in _PICKS:
        return [node.args[0]]
    if node.target in (_aten.index.Tensor, _aten.index_put.default):
        first = node.args[1][:1]  # type: ignore[index]
        return list(first)  # type: ignore[arg-type]
    return []
