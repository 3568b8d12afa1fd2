"""Which dimension of each value indexes tokens: the analysis that lets any region run on chosen tokens.

Before: a graph in which `h` (batch, tokens, width) is a residual stream, alone or beside others.
After: a `Layout` for every value computed from `h` by ops that treat tokens independently. Evaluated on the rows
`h[:, chosen]`, these ops give the rows `chosen` of the same values. The result of an op without a rule here has no
layout, such as one that mixes tokens (a convolution, a norm over tokens, the keys of an attention).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import fx

from moeca_compile.ops.aten import MATMULS, NORMS, PERMUTES, RESHAPES, SDPA, SOFTMAXES, SPLITS
from moeca_compile.ops.markers import MARKERS
from moeca_compile.passes.analysis.axis import Layout, Span, cut, join, overlap
from moeca_compile.passes.analysis.graph import argument, is_pointwise, shape_of
from moeca_compile.passes.analysis.viewed_layout import viewed_layout

aten = torch.ops.aten


Layouts = dict[fx.Node, Layout]
Rule = Callable[[fx.Node, Layouts], "Layout | None"]


def stream_layout(stream: fx.Node) -> Layout:
    """The layout of a residual stream (batch, tokens, width) that is not computed from another stream."""
    samples, tokens = shape_of(stream)[:2]
    return Layout(0, 1, samples, tokens, (Span(stream, 0, tokens),))


def token_layouts(graph: fx.Graph, seeds: Layouts, mixed: set[fx.Node] | None = None) -> Layouts:
    """Propagate the layouts of `seeds` to everything computed from them, op by op.

    Where `mixed` is given, a value that mixes tokens (a convolution) but has one row for each token, in the shape
    (samples, tokens, width) or (samples * tokens, width), gets a layout too and is added to `mixed`. Its rows cannot
    be computed from rows; they must be gathered from the whole value.
    """
    found: Layouts = dict(seeds)
    lost: dict[fx.Node, set[Layout]] = {}
    for node in graph.nodes:
        if node in found or node.op != "call_function":
            continue
        streams = {layout for arg in node.all_input_nodes for layout in lost.get(arg, ())}
        streams |= {seed for arg in node.all_input_nodes if arg in found for seed in _streams_of(found[arg], seeds)}
        if streams:
            rule = _rule_for(node) if any(arg in found for arg in node.all_input_nodes) else None
            result = rule(node, found) if rule else None
            if result is None and mixed is not None:
                lost[node] = streams
                result = _rows_again(node, streams)
                if result is not None:
                    mixed.add(node)
            if result is not None:
                found[node] = result
    return found


def _streams_of(layout: Layout, seeds: Layouts) -> Iterator[Layout]:
    """The seeds whose tokens are in this layout."""
    return (seed for seed in seeds.values() if overlap(layout.axis, seed.axis))


def _rows_again(node: fx.Node, streams: set[Layout]) -> Layout | None:
    """The layout of a value with one row for each token of exactly one of these streams."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    found = [again for stream in streams if (again := _rows_of(node, stream)) is not None]
    return found[0] if len(found) == 1 else None


def _rows_of(node: fx.Node, stream: Layout) -> Layout | None:
    shape = shape_of(node)
    if shape[1:] == (stream.tokens, stream.tokens) and all(user.target in PERMUTES for user in node.users):
        return None  # either dim could be the tokens; a permutation follows that decides
    if len(shape) == 3 and shape[:2] == (stream.samples, stream.tokens):
        return replace(stream, batch=0, token=1)
    if len(shape) == 2 and shape[0] == stream.samples * stream.tokens:
        return replace(stream, batch=0, token=0)
    return None


def _normalize(dim: int, ndim: int) -> int:
    return dim % ndim


def _pointwise(node: fx.Node, layouts: Layouts) -> Layout | None:
    ndim = len(shape_of(node))
    carried = [arg for arg in node.all_input_nodes if arg in layouts]
    return _agreed(layouts[arg].shifted(ndim - len(shape_of(arg))) for arg in carried)


def _agreed(layouts: Iterable[Layout]) -> Layout | None:
    """The layout of the first operand; None where another has the same tokens in another layout.

    Tokens of another stream act as a table by position.
    """
    first, *others = dict.fromkeys(layouts)
    return None if any(overlap(first.axis, other.axis) for other in others) else first


def _carried(node: fx.Node, layouts: Layouts) -> tuple[fx.Node, Layout] | None:
    """The first argument with its layout, where no other argument carries the same tokens."""
    first = node.args[0]
    if not isinstance(first, fx.Node) or first not in layouts:
        return None
    others = [layouts[arg] for arg in node.all_input_nodes if arg is not first and arg in layouts]
    return None if any(overlap(layouts[first].axis, other.axis) for other in others) else (first, layouts[first])


def _same_unless_last(node: fx.Node, layouts: Layouts) -> Layout | None:
    """linear and the like: only the last dim is contracted."""
    carried = _carried(node, layouts)
    if carried is None:
        return None
    source, layout = carried
    last = len(shape_of(source)) - 1
    return layout if last not in (layout.batch, layout.token) else None


def _layer_norm(node: fx.Node, layouts: Layouts) -> Layout | None:
    carried = _carried(node, layouts)
    if carried is None:
        return None
    source, layout = carried
    leading = len(shape_of(source)) - len(argument(node, 1, "normalized_shape"))
    return layout if max(layout.batch, layout.token) < leading else None


def _along_dim(position: int, default: int | None = None, keepdim: int | None = None) -> Rule:
    """Ops that mix one or more dims (softmax, sum, topk): the token dim must not be among them.

    `keepdim` is the position of that flag for reductions, None for ops that preserve the shape.
    """

    def rule(node: fx.Node, layouts: Layouts) -> Layout | None:
        carried = _carried(node, layouts)
        if carried is None:
            return None
        source, layout = carried
        ndim = len(shape_of(source))
        dims = argument(node, position, "dim", default)
        if dims is None or dims == []:  # both mean all dims
            return None
        reduced = {_normalize(d, ndim) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
        if {layout.batch, layout.token} & reduced:
            return None
        if keepdim is None or argument(node, keepdim, "keepdim", False):
            return layout
        return layout.moved(lambda d: d - sum(r < d for r in reduced))

    return rule


def _view(node: fx.Node, layouts: Layouts) -> Layout | None:
    carried = _carried(node, layouts)
    if carried is None:
        return None
    source, layout = carried
    return viewed_layout(layout, shape_of(source), shape_of(node))


def _permute(node: fx.Node, layouts: Layouts) -> Layout | None:
    carried = _carried(node, layouts)
    if carried is None:
        return None
    source, layout = carried
    ndim = len(shape_of(source))
    order = list(range(ndim))
    if node.target is aten.permute.default:
        order = [_normalize(d, ndim) for d in argument(node, 1, "dims")]
    elif node.target is aten.t.default:
        order = order[::-1]
    else:
        a, b = _normalize(argument(node, 1, "dim0"), ndim), _normalize(argument(node, 2, "dim1"), ndim)
        order[a], order[b] = order[b], order[a]
    return layout.moved(order.index)


def _insert_dim(node: fx.Node, layouts: Layouts) -> Layout | None:
    carried = _carried(node, layouts)
    if carried is None:
        return None
    new = _normalize(argument(node, 1, "dim"), len(shape_of(node)))
    return carried[1].moved(lambda d: d + (new <= d))


def _remove_dim(node: fx.Node, layouts: Layouts) -> Layout | None:
    """squeeze.dim, select.int and unbind.int remove one dim."""
    carried = _carried(node, layouts)
    if carried is None:
        return None
    source, layout = carried
    dim = _normalize(argument(node, 1, "dim", 0), len(shape_of(source)))
    if len(shape_of(node)) == len(shape_of(source)):
        return layout  # squeeze of a dim that is not 1
    if dim in (layout.batch, layout.token):
        return None
    return layout.moved(lambda d: d - (dim < d))


def _slice(node: fx.Node, layouts: Layouts) -> Layout | None:
    """A slice along the tokens cuts their axis; one along another dim leaves it as it is."""
    carried = _carried(node, layouts)
    if carried is None:
        return None
    _, layout = carried
    size, rest = sliced(node)
    if rest == (0, size, 1) or sliced_dim(node) not in (layout.batch, layout.token):
        return layout
    start, stop, step = rest
    if layout.merged or sliced_dim(node) == layout.batch or step != 1 or start >= stop:
        return None
    return layout.along(cut(layout.axis, start, stop))


def sliced_dim(node: fx.Node) -> int:
    """The dim that a slice cuts."""
    return _normalize(argument(node, 1, "dim", 0), len(shape_of(node)))


def sliced(node: fx.Node) -> tuple[int, tuple[int, int, int]]:
    """The size of the dim that a slice cuts, and (start, stop, step) within it."""
    size = shape_of(node.args[0])[sliced_dim(node)]  # type: ignore[arg-type]
    bounds = (argument(node, position, name) for position, name in ((2, "start"), (3, "end"), (4, "step")))
    return size, slice(*bounds).indices(size)


def _within_dim(position: int) -> Rule:
    """split and chunk cut one dim, which must not be the samples or tokens."""

    def rule(node: fx.Node, layouts: Layouts) -> Layout | None:
        carried = _carried(node, layouts)
        if carried is None:
            return None
        source, layout = carried
        dim = _normalize(argument(node, position, "dim", 0), len(shape_of(source)))
        return layout if dim not in (layout.batch, layout.token) else None

    return rule


def _expand(node: fx.Node, layouts: Layouts) -> Layout | None:
    """expand, repeat and tile: the numbers of samples and tokens must not change."""
    carried = _carried(node, layouts)
    if carried is None:
        return None
    source, layout = carried
    shift = len(shape_of(node)) - len(shape_of(source))
    result = layout.shifted(shift)
    same = all(shape_of(node)[d + shift] == shape_of(source)[d] for d in (layout.batch, layout.token))
    return result if same else None


def _repeat_interleave(node: fx.Node, layouts: Layouts) -> Layout | None:
    carried = _carried(node, layouts)
    dim = argument(node, 2, "dim")
    if carried is None or dim is None:
        return None
    layout = carried[1]
    return layout if _normalize(dim, len(shape_of(node))) not in (layout.batch, layout.token) else None


def _last_dim(node: fx.Node, layouts: Layouts) -> Layout | None:
    """view_as_complex and view_as_real: a last dim of size 2 is removed or added."""
    carried = _carried(node, layouts)
    if carried is None:
        return None
    source, layout = carried
    leading = min(len(shape_of(source)), len(shape_of(node)))
    return layout if max(layout.batch, layout.token) < leading else None


def _einsum(node: fx.Node, layouts: Layouts) -> Layout | None:
    """Rows times weights: the result has samples and tokens, and no other operand has the tokens' letter."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    holding = [i for i, operand in enumerate(operands) if operand in layouts]  # type: ignore[arg-type]
    if len(holding) != 1 or "." in equation or "->" not in equation:
        return None
    inputs, out = equation.split("->")
    terms, layout = inputs.split(","), layouts[operands[holding[0]]]  # type: ignore[index]
    own = terms.pop(holding[0])
    batch, token = own[layout.batch], own[layout.token]
    shared = any(token in term for term in terms) or own.count(token) != 1 or own.count(batch) != 1
    if shared or batch not in out or token not in out:
        return None
    return replace(layout, batch=out.index(batch), token=out.index(token))


def _getitem(node: fx.Node, layouts: Layouts) -> Layout | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.target is aten.native_layer_norm.default and node.args[1] != 0:
        return None
    return layouts.get(source)


def _cat(node: fx.Node, layouts: Layouts) -> Layout | None:
    parts: Sequence[fx.Node] = argument(node, 0, "tensors")
    dim = _normalize(argument(node, 1, "dim", 0), len(shape_of(node)))
    first = next(layouts[part] for part in parts if part in layouts)
    if node.target is aten.cat.default and dim in (first.batch, first.token):
        return _joined(parts, dim, layouts)
    layout = _agreed(layouts[part] for part in parts if part in layouts)
    if layout is not None and node.target is aten.stack.default:
        return layout.moved(lambda d: d + (dim <= d))
    return layout


def _joined(parts: Sequence[fx.Node], dim: int, layouts: Layouts) -> Layout | None:
    """Concatenation along the tokens; a part without a layout is a new source of tokens."""
    known = [layouts[part] for part in parts if part in layouts]
    forms = {(layout.batch, layout.token, layout.samples) for layout in known}
    axes = [layouts[p].axis if p in layouts else (Span(p, 0, shape_of(p)[dim]),) for p in parts]
    twice = any(overlap(one, other) for i, one in enumerate(axes) for other in axes[:i])
    if len(forms) != 1 or known[0].merged or dim != known[0].token or twice:
        return None
    return known[0].along(join(axes))


def _matmul(node: fx.Node, layouts: Layouts) -> Layout | None:
    """Rows times a matrix that holds no tokens."""
    carried = _carried(node, layouts)
    if carried is None:
        return None
    source, layout = carried
    ndim = len(shape_of(source))
    same_rank = len(shape_of(node)) == ndim
    matrices = [shape_of(arg) for arg in node.all_input_nodes if arg is not source]
    shared = all(
        ndim - len(m) > layout.token or m[layout.token - ndim] == 1 for m in matrices if layout.token < ndim - 2
    )
    return layout if same_rank and shared and ndim - 1 not in (layout.batch, layout.token) else None


def _attention(node: fx.Node, layouts: Layouts) -> Layout | None:
    """Queries are rows, keys and values are whole: the output has the queries' layout."""
    query = argument(node, 0, "query")
    layout = layouts.get(query)
    is_rows = layout is not None and not layout.merged and layout.token == len(shape_of(query)) - 2
    return layout if is_rows and shape_of(node)[:-1] == shape_of(query)[:-1] else None


def _by_index(node: fx.Node, layouts: Layouts) -> Layout | None:
    """gather and scatter: each row is read or written at indices, and with values, of its own."""
    source, dim, *others = node.args
    layout = layouts.get(source)  # type: ignore[arg-type]
    if layout is None or any(layouts.get(arg) != layout for arg in others if isinstance(arg, fx.Node)):
        return None
    return layout if _normalize(dim, len(shape_of(node))) not in (layout.batch, layout.token) else None  # type: ignore[arg-type]


def _experts(node: fx.Node, layouts: Layouts) -> Layout | None:
    return layouts.get(argument(node, 0, "x"))


def _rule_for(node: fx.Node) -> Rule | None:
    if is_pointwise(node.target):
        return _pointwise
    return _RULES.get(node.target)


_RULES: dict[object, Rule] = {
    aten.linear.default: _same_unless_last,
    **dict.fromkeys(NORMS | {aten.native_layer_norm.default}, _layer_norm),
    **dict.fromkeys(SOFTMAXES | {aten.log_softmax.int}, _along_dim(1)),
    aten.topk.default: _along_dim(2, default=-1),
    aten.sort.default: _along_dim(1, default=-1),
    aten.cumsum.default: _along_dim(1),
    aten.sum.dim_IntList: _along_dim(1, keepdim=2),
    aten.mean.dim: _along_dim(1, keepdim=2),
    aten.amax.default: _along_dim(1, keepdim=2),
    aten.amin.default: _along_dim(1, keepdim=2),
    aten.linalg_vector_norm.default: _along_dim(2, keepdim=3),
    **dict.fromkeys(RESHAPES, _view),
    **dict.fromkeys(PERMUTES, _permute),
    aten.unsqueeze.default: _insert_dim,
    aten.squeeze.dim: _remove_dim,
    aten.select.int: _remove_dim,
    aten.unbind.int: _remove_dim,
    aten.slice.Tensor: _slice,
    **dict.fromkeys(SPLITS, _within_dim(2)),
    aten.expand.default: _expand,
    aten.repeat.default: _expand,
    aten.tile.default: _expand,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.view_as_complex.default: _last_dim,
    aten.view_as_real.default: _last_dim,
    aten.einsum.default: _einsum,
    aten.cat.default: _cat,
    aten.stack.default: _cat,
    **dict.fromkeys(MATMULS, _matmul),
    **dict.fromkeys((aten.gather.default, aten.scatter.value, aten.scatter.src), _by_index),
    SDPA: _attention,
    operator.getitem: _getitem,
    **dict.fromkeys(MARKERS, _experts),
}
"""One rule an op. To support another op, add its rule here and a case to the tests."""
