"""Run part of the graph on chosen tokens only: the heart of the rewrite.

A slice of the graph that treats tokens independently gives, on the rows `h[:, sel]` of its inputs, the rows
`sel` of its outputs. What such a slice reads besides its inputs is taken as it is when it holds no tokens
(weights, conditioning), and gathered with the same rows when it does (rotary tables, other activations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.ops.aten import RESHAPES, SDPA
from moeca_compile.ops.markers import MARKERS
from moeca_compile.passes.analysis.axis import Axis, Layout, place_in
from moeca_compile.passes.analysis.graph import is_pointwise, shape_of
from moeca_compile.passes.analysis.token_axis import Layouts, sliced_dim
from moeca_compile.passes.match.attention import sdpa_options

aten = torch.ops.aten


class NotRowWiseError(Exception):
    """The slice cannot be run on chosen tokens; the message names the op that stops it."""


def take_rows(value: Tensor, layout: Layout, chosen: Tensor) -> Tensor:
    """Rows `chosen` (samples, C) of `value`: the token dim goes from `layout.tokens` to C, all else stays."""
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
    keep = _along(valid, layout, value.ndim)
    return value.scatter(layout.token, index, torch.where(keep, rows, value.gather(layout.token, index)))


def split_layout(layout: Layout) -> Layout:
    """The layout of a merged value once its dim is taken apart into samples and tokens."""
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
        whole: gives a node's value for all tokens (used for what is read from outside the slice).
        sources: nodes whose rows are gathered, not computed: the inputs of the slice. What lies before all of
            them in the graph cannot depend on them, and is gathered too.
        axis: what `chosen` counts in, by default the axis of the first source. A value on a longer axis, such as
            picture and text together, has its rows where these tokens lie on it.
        mixed: nodes that mix tokens; their rows are gathered from the whole value.
    """

    def __init__(
        self,
        chosen: Tensor,
        layouts: Layouts,
        whole: Callable[[fx.Node], Any],
        sources: Iterable[fx.Node],
        axis: Axis | None = None,
        mixed: Set[fx.Node] = frozenset(),
    ) -> None:
        self.chosen = chosen
        self.layouts = layouts
        self.whole = whole
        self.sources = set(sources)
        self.first = min(self.sources)
        self.axis = axis or layouts[self.first].axis
        self.places: dict[Axis, int | None] = {}
        self.mixed = mixed
        self.values: dict[fx.Node, Any] = {}

    def __getitem__(self, node: fx.Node) -> Any:
        """The value of `node` on the chosen tokens. Raises NotRowWiseError where it cannot be computed from rows."""
        stack = [node]
        while stack:
            current = stack[-1]
            missing = [arg for arg in self._inputs(current) if arg not in self.values]
            if current in self.values or not missing:
                stack.pop()
                self._settle(current)
            else:
                stack.extend(missing)
        return self.values[node]

    def aligned(self, node: fx.Node, like: fx.Node) -> Any:
        """The rows of `node`, which is laid out as `like`; taken from its whole value where it mixes tokens or has
        none of the stream's (a timestep embedding or a context that was spread over the tokens)."""
        if node in self.layouts:
            return self[node]
        return take_rows(self.whole(node), self.layouts[like], self.chosen)

    def set(self, node: fx.Node, rows: Any) -> None:
        """Give the rows of `node` instead of computing them."""
        self.values[node] = rows

    def _settle(self, node: fx.Node) -> None:
        if node in self.values:
            return
        if self._gathered(node):
            self.values[node] = take_rows(self.whole(node), self.layouts[node], self._places_of(node))
        else:
            self.values[node] = self._compute(node)

    def _place(self, node: fx.Node) -> int | None:
        """Where the tokens that `chosen` counts begin on the node's own axis; None where they are not on it."""
        if node not in self.layouts:
            return None
        axis = self.layouts[node].axis
        if axis not in self.places:
            self.places[axis] = place_in(axis, self.axis)
        return self.places[axis]

    def _places_of(self, node: fx.Node) -> Tensor:
        """The chosen tokens, counted on the node's own axis."""
        place = self._place(node)
        return self.chosen + place if place else self.chosen

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        if node in self.values or self._gathered(node):
            return []
        if self._place(node) is None:
            raise NotRowWiseError(f"{node.target} has no token axis")
        if node.target is SDPA:
            if any(self._place(arg) is not None for arg in node.args[1:3]):  # type: ignore[arg-type]
                raise NotRowWiseError(f"{node.target} needs the keys and values of all tokens")
            return [node.args[0]]  # type: ignore[list-item]
        if node.target in MARKERS:
            raise NotRowWiseError("an MoE layer stands in the same branch")
        if self._joins(node):
            return [self._holder(node)]
        return [arg for arg in node.all_input_nodes if self._place(arg) is not None]

    def _gathered(self, node: fx.Node) -> bool:
        known = node in self.sources or node in self.mixed or node < self.first
        return known and self._place(node) is not None

    def _joins(self, node: fx.Node) -> bool:
        """Whether the node puts tokens after tokens, or cuts them off again."""
        token = self.layouts[node].token
        if node.target is aten.slice.Tensor:
            return sliced_dim(node) == token
        return node.target is aten.cat.default and _cat_dim(node) == token

    def _holder(self, node: fx.Node) -> fx.Node:
        """The operand of a cat or slice along the tokens that has all of the rows."""
        holder = next((arg for arg in node.all_input_nodes if self._place(arg) is not None), None)
        if holder is None:
            raise NotRowWiseError(f"{node.target} joins the tokens of the branch")
        return holder

    def _compute(self, node: fx.Node) -> Any:
        if self._joins(node):
            return self.values[self._holder(node)]
        layout = self.layouts[node]
        if node.target is SDPA:
            return self._attend(node)

        def value(arg: fx.Node) -> Any:
            return self._from_outside(node, arg, layout) if self._place(arg) is None else self.values[arg]

        args = fx.map_arg(node.args, value)
        kwargs = fx.map_arg(node.kwargs, value)
        resized = _RESIZED.get(node.target)
        if resized is not None:
            return resized(args, self._row_shape(node))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _row_shape(self, node: fx.Node) -> list[int]:
        """The node's shape with as many tokens as were chosen."""
        layout, shape = self.layouts[node], list(shape_of(node))
        count = self.chosen.shape[1]
        shape[layout.token] = layout.samples * count if layout.merged else count
        return shape

    def _attend(self, sdpa: fx.Node) -> Tensor:
        """Chosen queries against keys and values that hold no tokens of the stream, whole."""
        query, key, value = sdpa.args[:3]
        options, mask = sdpa_options(sdpa), self.attention_mask(sdpa)
        scale, gqa = options["scale"], options["enable_gqa"]
        operands = (self.values[query], self.whole(key), self.whole(value))  # type: ignore[index, arg-type]
        return F.scaled_dot_product_attention(*operands, mask, scale=scale, enable_gqa=gqa)

    def attention_mask(self, sdpa: fx.Node) -> Tensor | None:
        """The mask of the chosen queries of an attention; what is causal becomes a mask of their positions."""
        query, key = sdpa.args[:2]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
        options, layout, shape = sdpa_options(sdpa), self.layouts[query], shape_of(query)
        mask = options["attn_mask"]
        if options["is_causal"]:
            rows = _along(self._places_of(query), layout, len(shape))
            return rows >= torch.arange(shape_of(key)[-2], device=rows.device)
        if mask is None:
            return None
        own = self.layouts.get(mask)
        if own is not None and own.shifted(len(shape) - len(shape_of(mask))) == layout:
            return self[mask]
        return self._aligned(self.whole(mask), shape, layout, self._places_of(query))

    def _from_outside(self, node: fx.Node, arg: fx.Node, layout: Layout) -> Any:
        """A value without these tokens; one indexed by position (a rotary table) gives its rows."""
        value = self.whole(arg)
        if not isinstance(value, Tensor) or not _aligns_inputs(node.target):
            return value
        return self._aligned(value, *_operand(node, layout), self._places_of(node))

    def _aligned(self, value: Tensor, shape: tuple[int, ...], layout: Layout, places: Tensor) -> Tensor:
        """Rows of a value that broadcasts against one with this shape and layout; itself where it has no tokens."""
        dim = layout.token - (len(shape) - value.ndim)
        if dim < 0 or value.shape[dim] != shape[layout.token] or value.shape[dim] == 1:
            return value
        return take_rows(self._over_samples(value, len(shape), layout), layout, places)

    @staticmethod
    def _over_samples(value: Tensor, ndim: int, layout: Layout) -> Tensor:
        """A table shared by all samples, seen once a sample: its rows differ where the choices do."""
        shape = [1] * (ndim - value.ndim) + list(value.shape)
        if not layout.merged:
            shape[layout.batch] = layout.samples * layout.inner
        return value.expand(shape)


def _operand(node: fx.Node, layout: Layout) -> tuple[tuple[int, ...], Layout]:
    """Shape and layout that the inputs of `node` are aligned with: its own, before `stack` inserted a dim."""
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
"""Ops that carry literal sizes: on chosen tokens the token count among them is the chosen count."""
