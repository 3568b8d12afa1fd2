"""Run part of the graph on chosen tokens only: the core of the rewrite.

Where a part of the graph treats tokens independently, the rows `h[:, chosen]` of its inputs give the rows `chosen` of
its outputs. What it reads besides its inputs is used whole where it holds no tokens (weights, conditioning). Where it
does (rotary tables, other activations), the same rows are gathered from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile._torch_private import is_fake
from moeca_compile.ops.aten import RESHAPES, SDPA
from moeca_compile.ops.markers import MARKERS
from moeca_compile.passes.analysis.axis import Axis, Layout, offset_in
from moeca_compile.passes.analysis.graph import is_pointwise, last_uses, shape_of
from moeca_compile.passes.analysis.token_axis import Layouts, sliced_dim
from moeca_compile.passes.match.attention import sdpa_options

aten = torch.ops.aten


RunRows = Callable[["Rows"], Tensor]
"""Runs an MoE layer on chosen tokens: the output of the layer's marker for these rows."""


class NotRowWiseError(Exception):
    """A part of the graph cannot run on chosen tokens; the message names the op that prevents it."""


def take_rows(value: Tensor, layout: Layout, chosen: Tensor) -> Tensor:
    """Rows `chosen` (samples, C) of `value`: the token dim shrinks from `layout.tokens` to C."""
    if layout.merged:
        apart = value.unflatten(layout.token, (layout.samples, layout.tokens))
        rows = take_rows(apart, split_layout(layout), chosen)
        return rows.flatten(layout.batch, layout.batch + 1)
    return value.gather(layout.token, _row_index(chosen, layout, value.shape))


def put_rows(value: Tensor, layout: Layout, chosen: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
    """`value` with its rows `chosen` (samples, C) replaced by `rows` where `valid` (samples, C) is true."""
    if layout.merged:
        apart = value.unflatten(layout.token, (layout.samples, layout.tokens))
        fresh = rows.unflatten(layout.token, (layout.samples, chosen.shape[1]))
        return put_rows(apart, split_layout(layout), chosen, fresh, valid).flatten(layout.batch, layout.batch + 1)
    index = _row_index(chosen, layout, value.shape)
    mask = _along(valid, layout, value.ndim)
    return value.scatter(layout.token, index, torch.where(mask, rows, value.gather(layout.token, index)))


def split_layout(layout: Layout) -> Layout:
    """The layout of a merged value after its dim is unflattened into samples and tokens."""
    return replace(layout, token=layout.batch + 1)


def _along(per_row: Tensor, layout: Layout, ndim: int) -> Tensor:
    """(samples, C) viewed so that it broadcasts against a value of `ndim` dims with this layout."""
    if layout.inner > 1:
        per_row = per_row.repeat_interleave(layout.inner, 0)
    shape = [1] * ndim
    shape[layout.batch], shape[layout.token] = per_row.shape
    ordered = per_row if layout.batch < layout.token else per_row.t()
    return ordered.reshape(shape)


def _row_index(chosen: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    size = list(shape)
    size[layout.token] = chosen.shape[1]
    return _along(chosen, layout, len(shape)).expand(size)


class Rows:
    """Values of the graph on chosen tokens, computed on demand.

    Args:
        chosen: (samples, C) token indices, distinct within a sample.
        layouts: the token-axis analysis of the graph.
        whole: gives a node's value for all tokens (for values read from outside the part that runs).
        sources: the inputs of the part that runs: their rows are gathered, not computed. Nodes before all of them
            in the graph cannot depend on them, and are gathered too.
        axis: the axis that `chosen` indexes, by default that of the first source. On a longer axis, such as image
            and text together, the indices are offset to where these tokens begin.
        mixed: nodes that mix tokens; their rows are gathered from the whole value.
        layers: by its marker, what runs an MoE layer on chosen tokens (rewrite.layers). Others cannot be run.
    """

    def __init__(
        self,
        chosen: Tensor,
        layouts: Layouts,
        whole: Callable[[fx.Node], Any],
        sources: Iterable[fx.Node],
        axis: Axis | None = None,
        mixed: Set[fx.Node] = frozenset(),
        layers: Mapping[fx.Node, RunRows] | None = None,
    ) -> None:
        self.chosen = chosen
        self.layouts = layouts
        self.whole = whole
        self.sources = set(sources)
        self.first = min(self.sources)
        self.axis = axis or layouts[self.first].axis
        self.offsets: dict[Axis, int | None] = {}
        self.mixed = mixed
        self.layers = layers or {}
        self.values: dict[fx.Node, Any] = {}

    def __getitem__(self, node: fx.Node) -> Any:
        """The value of `node` on the chosen tokens. Raises NotRowWiseError where it cannot be computed from rows."""
        return self.of(node)[0]

    def of(self, *nodes: fx.Node) -> list[Any]:
        """The values of `nodes` on the chosen tokens; the same as one by one, but what they share is computed once.

        Values that are computed on the way are dropped after their last use. In a trace they hold no memory and stay,
        so that nothing is computed twice in the traced step.
        """
        work = self._work(nodes)
        last = last_uses([(node, *inputs) for node, inputs in work.items()], [*nodes, *self.values])
        for node, dead in zip(work, last, strict=True):
            self._evaluate(node)
            if not is_fake(self.chosen):
                for each in dead:
                    del self.values[each]
        return [self.values[node] for node in nodes]

    def _work(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """What is to be computed for `nodes`, in order, with the rows that each reads."""
        work: dict[fx.Node, list[fx.Node]] = {}
        stack = [*nodes][::-1]
        while stack:
            current = stack[-1]
            inputs = [] if current in work else self._inputs(current)
            missing = [arg for arg in inputs if arg not in self.values and arg not in work]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            if current not in self.values:
                work.setdefault(current, inputs)
        return work

    def aligned(self, node: fx.Node, like: fx.Node) -> Any:
        """The rows of `node`, which has the layout of `like`. Taken from its whole value where the analysis found no
        tokens in it (a timestep embedding or a context that is expanded over the tokens)."""
        if node in self.layouts:
            return self[node]
        return take_rows(self.whole(node), self.layouts[like], self.chosen)

    def set(self, node: fx.Node, rows: Any) -> None:
        """Set the rows of `node`, which are then not computed."""
        self.values[node] = rows

    def _evaluate(self, node: fx.Node) -> None:
        if self._gathered(node):
            self.values[node] = take_rows(self.whole(node), self.layouts[node], self._positions(node))
        else:
            self.values[node] = self._compute(node)

    def _offset(self, node: fx.Node) -> int | None:
        """Where the tokens that `chosen` indexes begin on the node's own axis; None where they are not on it."""
        if node not in self.layouts:
            return None
        axis = self.layouts[node].axis
        if axis not in self.offsets:
            self.offsets[axis] = offset_in(axis, self.axis)
        return self.offsets[axis]

    def _positions(self, node: fx.Node) -> Tensor:
        """Indices of the chosen tokens on the node's own axis."""
        offset = self._offset(node)
        return self.chosen + offset if offset else self.chosen

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        if node in self.values or self._gathered(node) or node in self.layers:
            return []  # a layer asks for its inputs by itself
        if self._offset(node) is None:
            raise NotRowWiseError(f"{node.target} has no token axis")
        if node.target is SDPA:
            if any(self._offset(arg) is not None for arg in node.args[1:3]):  # type: ignore[arg-type]
                raise NotRowWiseError(f"{node.target} needs the keys and values of all tokens")
            return [node.args[0]]  # type: ignore[list-item]
        if node.target in MARKERS:
            raise NotRowWiseError("an MoE layer is in the same branch")
        if self._joins(node):
            return [self._holder(node)]
        return [arg for arg in node.all_input_nodes if self._offset(arg) is not None]

    def _gathered(self, node: fx.Node) -> bool:
        known = node in self.sources or node in self.mixed or node < self.first
        return known and self._offset(node) is not None

    def _joins(self, node: fx.Node) -> bool:
        """Whether the node concatenates or slices along the tokens."""
        token = self.layouts[node].token
        if node.target is aten.slice.Tensor:
            return sliced_dim(node) == token
        return node.target is aten.cat.default and _cat_dim(node) == token

    def _holder(self, node: fx.Node) -> fx.Node:
        """The operand of a cat or slice along the tokens that holds all chosen tokens."""
        holder = next((arg for arg in node.all_input_nodes if self._offset(arg) is not None), None)
        if holder is None:
            raise NotRowWiseError(f"{node.target} joins the tokens of the branch")
        return holder

    def _compute(self, node: fx.Node) -> Any:
        if node in self.layers:
            return self.layers[node](self)
        if self._joins(node):
            return self.values[self._holder(node)]
        layout = self.layouts[node]
        if node.target is SDPA:
            return self._attend(node)

        def value(arg: fx.Node) -> Any:
            return self._from_outside(node, arg, layout) if self._offset(arg) is None else self.values[arg]

        args = fx.map_arg(node.args, value)
        kwargs = fx.map_arg(node.kwargs, value)
        resized = _RESIZED.get(node.target)
        if resized is not None:
            return resized(args, self._row_shape(node))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _row_shape(self, node: fx.Node) -> list[int]:
        """The node's shape with the number of chosen tokens."""
        layout, shape = self.layouts[node], list(shape_of(node))
        count = self.chosen.shape[1]
        shape[layout.token] = layout.samples * count if layout.merged else count
        return shape

    def _attend(self, sdpa: fx.Node) -> Tensor:
        """Attention of chosen queries to whole keys and values, which hold no tokens of the stream."""
        query, key, value = sdpa.args[:3]
        options, mask = sdpa_options(sdpa), self.attention_mask(sdpa)
        scale, gqa = options["scale"], options["enable_gqa"]
        operands = (self.values[query], self.whole(key), self.whole(value))  # type: ignore[index, arg-type]
        return F.scaled_dot_product_attention(*operands, mask, scale=scale, enable_gqa=gqa)

    def attention_mask(self, sdpa: fx.Node) -> Tensor | None:
        """The mask for the chosen queries of an attention; `is_causal` becomes a mask by their positions."""
        query, key = sdpa.args[:2]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
        options, layout, shape = sdpa_options(sdpa), self.layouts[query], shape_of(query)
        mask = options["attn_mask"]
        if options["is_causal"]:
            rows = _along(self._positions(query), layout, len(shape))
            return rows >= torch.arange(shape_of(key)[-2], device=rows.device)
        if mask is None:
            return None
        own = self.layouts.get(mask)
        if own is not None and own.shifted(len(shape) - len(shape_of(mask))) == layout:
            return self[mask]
        return self._aligned(self.whole(mask), shape, layout, self._positions(query))

    def _from_outside(self, node: fx.Node, arg: fx.Node, layout: Layout) -> Any:
        """A value without these tokens, whole; of one indexed by position (a rotary table), the rows."""
        value = self.whole(arg)
        if not isinstance(value, Tensor) or not _aligns_inputs(node.target):
            return value
        return self._aligned(value, *_operand(node, layout), self._positions(node))

    def _aligned(self, value: Tensor, shape: tuple[int, ...], layout: Layout, positions: Tensor) -> Tensor:
        """Rows of a value that broadcasts against this shape and layout; all of it where it has no token dim."""
        dim = layout.token - (len(shape) - value.ndim)
        if dim < 0 or value.shape[dim] != shape[layout.token] or value.shape[dim] == 1:
            return value
        return take_rows(self._over_samples(value, len(shape), layout), layout, positions)

    @staticmethod
    def _over_samples(value: Tensor, ndim: int, layout: Layout) -> Tensor:
        """A table shared by all samples, expanded over them, since samples choose different rows."""
        shape = [1] * (ndim - value.ndim) + list(value.shape)
        if not layout.merged:
            shape[layout.batch] = layout.samples * layout.inner
        return value.expand(shape)


def _operand(node: fx.Node, layout: Layout) -> tuple[tuple[int, ...], Layout]:
    """Shape and layout that the inputs of `node` align with: its own, less the dim that `stack` inserts."""
    shape = shape_of(node)
    if node.target is not aten.stack.default:
        return shape, layout
    dim = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(dim, int)
    new = dim % len(shape)
    return shape[:new] + shape[new + 1 :], layout.moved(lambda d: d - (new < d))


def _cat_dim(node: fx.Node) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % len(shape_of(node))


def _aligns_inputs(target: object) -> bool:
    return is_pointwise(target) or target in (aten.cat.default, aten.stack.default)


_RESIZED: dict[object, Callable[[Any, list[int]], Tensor]] = {
    op: (lambda args, shape: args[0].reshape(shape)) for op in RESHAPES
} | {aten.expand.default: lambda args, shape: args[0].expand(shape)}
"""Ops with literal sizes: on chosen tokens, the token count among the sizes is the number of chosen tokens."""
