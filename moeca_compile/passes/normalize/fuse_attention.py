"""Attention written as two products and a softmax becomes one scaled_dot_product_attention.

Before:  scores = matmul(q, transpose(k, -2, -1)) * 0.125 + bias
         out = matmul(softmax(scores, -1), v)
After:   out = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.125)

The products may be matmul, bmm, baddbmm or einsum over dims in any order. Between them there may be casts, factors,
masks, biases and views that only regroup heads. An attention with anything else on the way (live dropout, a tanh of
the scores) is not fused, and `unclear_attentions` says why.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import fx

from moeca_compile.ops.aten import CASTS, NORMS, RESHAPES, SDPA, SOFTMAXES
from moeca_compile.passes.analysis.graph import ancestors, argument, shape_of
from moeca_compile.passes.analysis.products import Product, product
from moeca_compile.passes.normalize.insert import Inserted, permutation

aten = torch.ops.aten
_LAYERS = NORMS | {aten.linear.default, aten.conv1d.default, SDPA}
_FACTORS = {aten.mul.Tensor: False, aten.mul.Scalar: False, aten.div.Tensor: True, aten.div.Scalar: True}
"""Products and quotients of scores; True where the factor is the reciprocal."""


class UnclearError(Exception):
    """An attention that scaled_dot_product_attention cannot express; the message says why."""


@dataclass(frozen=True)
class Term:
    """A bias or a boolean mask of the scores; it broadcasts against scores of `shape`."""

    node: fx.Node
    shape: tuple[int, ...]
    factor: float = 1.0
    kind: str = "bias"
    """"bias", "keep" (a mask that is true where a query attends), or "drop" (true where it does not)."""
    fill: float = -inf
    """The value of masked scores. Where it is finite, a query whose keys are all masked attends to all of them."""


@dataclass(frozen=True)
class Scores:
    """factor * query @ key, plus biases, masked; `path` holds the nodes from the product to the softmax."""

    product: Product
    path: tuple[fx.Node, ...]
    factor: float = 1.0
    terms: tuple[Term, ...] = ()
    temperatures: tuple[tuple[fx.Node, bool], ...] = ()
    """Factors that are tensors, with one value per head or fewer, and whether they divide."""

    def then(self, node: fx.Node, *terms: Term) -> Scores:
        return replace(self, path=(*self.path, node), terms=(*self.terms, *terms))

    def times(self, node: fx.Node, factor: float) -> Scores:
        terms = tuple(replace(t, factor=t.factor * factor) for t in self.terms)
        if factor <= 0 and any(term.kind != "bias" for term in self.terms):
            raise UnclearError("its masked scores change their sign")
        return replace(self.then(node), factor=self.factor * factor, terms=terms)


@dataclass(frozen=True)
class UnfusedAttention:
    """One attention: its scores, the product `output` of their softmax with the values, and the roles of the dims.

    All labels are those of the first product; `batch` holds samples, heads and the like.
    """

    scores: Scores
    output: Product
    value: fx.Node
    value_labels: list[str]
    out_labels: list[str]
    sizes: dict[str, int]
    batch: tuple[str, ...]
    query: str
    key: str
    depth: str
    width: str


def fuse_attention(graph: fx.Graph) -> int:
    """Rewrite unfused attention in place; returns how many."""
    count = 0
    for _, unfused in _candidates(graph):
        if isinstance(unfused, UnfusedAttention):
            _rewrite(graph, unfused)
            count += 1
    return count


def unclear_attentions(graph: fx.Graph) -> list[tuple[fx.Node, str]]:
    """Attentions that cannot be fused, each with the reason."""
    return [(node, reason) for node, reason in _candidates(graph) if isinstance(reason, str)]


def _candidates(graph: fx.Graph) -> Iterator[tuple[fx.Node, UnfusedAttention | str]]:
    for node in list(graph.nodes):
        try:
            unfused = _recognize(node)
        except UnclearError as error:
            yield node, str(error)
        else:
            if unfused is not None:
                yield node, unfused


# --- recognizing ------------------------------------------------------------------------------------------


def _recognize(node: fx.Node) -> UnfusedAttention | None:
    """The attention that ends in the product `node`, None where there is none. Raises UnclearError."""
    output = product(node)
    if output is None:
        return None
    for operand, labels, value in (
        (output.left, output.left_labels, output.right),
        (output.right, output.right_labels, output.left),
    ):
        weights = _softmax_behind(operand)
        if weights is None or not _products_behind(weights[0]):
            continue
        softmax, order, path = weights
        scores = _scores(softmax.args[0])
        if scores is None:
            raise UnclearError("its scores are not products of queries and keys with scales, biases and masks only")
        _check_path(softmax, [*path, *scores.path], node)
        if len(labels) != len(scores.product.out_labels):
            raise UnclearError("its heads are regrouped between scores and values")
        same = {label: scores.product.out_labels[dim] for label, dim in zip(labels, order, strict=True)}
        return _with_roles(scores, output, value, same, softmax)
    return None


def _check_path(softmax: fx.Node, path: list[fx.Node], end: fx.Node) -> None:
    inside = {*path, end}
    if not all(user in inside for node in path for user in node.users):
        raise UnclearError("its attention weights are used by something else as well")
    last = len(shape_of(softmax)) - 1
    if any(_regroups(node) for node in path) and argument(softmax, 1, "dim") not in (-1, last):
        raise UnclearError("its softmax is not over the keys")


def _with_roles(
    scores: Scores, output: Product, value: fx.Node, same: dict[str, str], softmax: fx.Node
) -> UnfusedAttention:
    """Assign roles (query, key, heads, width) to dims by where they occur. `same` maps the softmax's labels."""
    first = scores.product
    names = {label: same.get(label, f"value {label}") for label in (*output.left_labels, *output.right_labels)}
    value_labels = [names[label] for label in (output.right_labels if value is output.right else output.left_labels)]
    dim = argument(softmax, 1, "dim") % len(shape_of(softmax)) - len(shape_of(softmax))
    key = first.out_labels[dim]
    if output.contracted is None or names[output.contracted] != key:
        raise UnclearError("its softmax is not over the keys")
    of_keys = first.operand(key)[1]
    rest = [label for label in first.out_labels if label != key]
    queries = [label for label in rest if label not in of_keys and label not in value_labels]
    widths = [label for label in value_labels if label not in first.out_labels]
    if not queries or len(widths) != 1 or first.contracted is None or first.operand(queries[-1])[1] == of_keys:
        raise UnclearError("the dims of its queries, keys and values do not match")
    batch = tuple(label for label in rest if label != queries[-1])
    natural = first.out_labels == (*batch, queries[-1], key)
    if not natural and (scores.temperatures or any(_regroups(node) for node in scores.path)):
        raise UnclearError("the order of its dims does not match that of its scale")
    sizes = {**{names[label]: size for label, size in output.sizes.items()}, **first.sizes}
    out_labels = [names[label] for label in output.out_labels]
    return UnfusedAttention(
        scores, output, value, value_labels, out_labels, sizes, batch, queries[-1], key, first.contracted, widths[0]
    )


def _softmax_behind(node: fx.Node) -> tuple[fx.Node, list[int], list[fx.Node]] | None:
    """(softmax, order, path): `node` is the softmax with its dims in this order, through the nodes of `path`."""
    order, path = list(range(len(shape_of(node)))), []
    dropped = False
    while node.target not in SOFTMAXES:
        path.append(node)
        if (order_here := permutation(node)) is not None:
            order = [order_here[dim] for dim in order]
        elif node.target is aten.dropout.default:  # it drops: drop_idle_dropouts removed the others
            dropped = True
        elif not (node.target in CASTS or _regroups(node)):
            if any(one.target in SOFTMAXES and _products_behind(one) for one in _near(node)):
                raise UnclearError("its attention weights are changed before they meet the values")
            return None
        node = node.args[0]  # type: ignore[assignment]
    if dropped and _products_behind(node):
        raise UnclearError("it draws random numbers")
    return node, order, [*path, node]


def _near(node: fx.Node, steps: int = 3) -> set[fx.Node]:
    """What `node` is computed from in at most `steps` ops, without a product."""
    found, last = {node}, {node}
    for _ in range(steps):
        last = {arg for one in last if product(one) is None for arg in one.all_input_nodes} - found
        found |= last
    return found


def _regroups(node: fx.Node) -> bool:
    """Whether a node is a view that leaves the last two dims, queries and keys, as they are."""
    if node.target not in RESHAPES:
        return False
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    return min(len(before), len(after)) > 2 and before[-2:] == after[-2:]


def _products_behind(softmax: fx.Node, depth: int = 12) -> bool:
    """Whether the scores come from a product of two activations, through any ops within `depth` steps."""
    keys = shape_of(softmax)[-1]
    near: list[Any] = [softmax.args[0]]
    for _ in range(depth):
        if any(_of_activations(node) for node in near):
            return True
        passed = [node for node in near if node.target not in _LAYERS and product(node) is None]
        near = [arg for node in passed for arg in node.all_input_nodes]
        near = [node for node in near if len(shape_of(node)) > 1 and shape_of(node)[-1] in (keys, keys - 1)]
    return False


def _of_activations(node: Any) -> bool:
    found = product(node)
    return found is not None and bool(found.batch) and found.contracted is not None


def _scores(node: Any) -> Scores | None:
    """`node` as scores. None where anything but factors, biases and masks is on the way."""
    if not isinstance(node, fx.Node):
        return None
    if _of_activations(node):
        return _first_scores(node)
    if node.target in CASTS or _regroups(node):
        return _then(_scores(node.args[0]), node)
    for rule in (_scaled, _biased, _masked, _shifted):
        found = rule(node)
        if found is not None:
            return found
    return None


def _then(scores: Scores | None, node: fx.Node, *terms: Term) -> Scores | None:
    return scores.then(node, *terms) if scores is not None else None


def _first_scores(node: fx.Node) -> Scores:
    found = product(node)
    assert found is not None
    scores = Scores(found, (node,))
    if node.target is not aten.baddbmm.default:
        return scores
    alpha, beta = (argument(node, i, name, 1.0) for i, name in ((4, "alpha"), (3, "beta")))
    bias = (Term(node.args[0], shape_of(node), float(beta)),) if beta else ()  # type: ignore[arg-type]
    return replace(scores, factor=float(alpha), terms=bias)


def _scaled(node: fx.Node) -> Scores | None:
    if node.target not in _FACTORS:
        return None
    one, factor = node.args[:2]
    divides = _FACTORS[node.target]
    if isinstance(factor, (int, float)):
        inner = _scores(one)
        return inner.times(node, 1 / factor if divides else factor) if inner is not None else None
    for scores, by in ((one, factor), (factor, one)) if not divides else ((one, factor),):
        inner = _scores(scores)
        if inner is not None and isinstance(by, fx.Node) and shape_of(by)[-2:] in ((), (1,), (1, 1)):
            if inner.terms or any(_regroups(step) for step in inner.path):
                raise UnclearError("its scores are scaled by a tensor after a bias or a mask")
            return replace(inner.then(node), temperatures=(*inner.temperatures, (by, divides)))
    return None


def _biased(node: fx.Node) -> Scores | None:
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or len(node.all_input_nodes) != 2:
        return None
    one, other = node.all_input_nodes
    sign = float(argument(node, 2, "alpha", 1.0)) * (1 if node.target is aten.add.Tensor else -1)
    inner = _scores(one)
    if inner is not None and inner.path[0] not in ancestors([other]):
        return inner.then(node, Term(other, shape_of(node), sign))
    inner = _scores(other) if sign == 1 else None
    if inner is not None and inner.path[0] not in ancestors([one]):
        return inner.then(node, Term(one, shape_of(node)))
    return None


def _shifted(node: fx.Node) -> Scores | None:
    """scores - max(scores) over the keys, which does not change the softmax."""
    if node.target is not aten.sub.Tensor or len(node.all_input_nodes) != 2:
        return None
    scores, peak = node.all_input_nodes
    beneath = [peak]
    while beneath[-1].target in CASTS:
        beneath.append(beneath[-1].args[0])  # type: ignore[arg-type]
    if beneath[-1].target is operator.getitem and beneath[-1].args[1] == 0:
        beneath.append(beneath[-1].args[0])  # type: ignore[arg-type]
    top = beneath[-1]
    is_peak = top.target in (aten.amax.default, aten.max.dim) and top.args[0] is scores
    last, dim = len(shape_of(scores)) - 1, argument(top, 1, "dim", [])
    if not is_peak or dim not in (-1, last, [-1], [last]) or not argument(top, 2, "keepdim", False):
        return None
    inner = _scores(scores)
    return replace(inner, path=(*inner.path, *beneath, node)) if inner is not None else None


def _masked(node: fx.Node) -> Scores | None:
    if node.target is aten.masked_fill.Scalar or node.target is aten.masked_fill.Tensor:
        scores, mask, fill = node.args[:3]
        kind = "drop"
    elif node.target in (aten.where.self, aten.where.ScalarOther):
        (mask, scores, fill), kind = node.args[:3], "keep"
    elif node.target is aten.where.ScalarSelf:
        (mask, fill, scores), kind = node.args[:3], "drop"
    else:
        return None
    inner = _scores(scores)
    if inner is None and node.target is aten.where.self:
        fill, scores, kind = scores, fill, "drop"
        inner = _scores(scores)
    if inner is None:
        return None
    assert isinstance(mask, fx.Node)
    number = _number(fill)
    # Minus infinity, or so far below any score that adding a score to it is lost in rounding.
    if number is None or number * torch.finfo(node.meta["val"].dtype).eps > -64:
        raise UnclearError("its masked scores are not minus infinity")
    return inner.then(node, Term(mask, shape_of(node), kind=kind, fill=number))


def _number(fill: Any) -> float | None:
    """A fill value as a number; None where it is not a constant of the graph."""
    if isinstance(fill, fx.Node) and fill.target in (aten.full.default, aten.full_like.default):
        fill = fill.args[1]
    if isinstance(fill, fx.Node) and fill.target is aten.scalar_tensor.default:
        fill = fill.args[0]
    return float(fill) if isinstance(fill, (int, float)) else None


# --- rewriting --------------------------------------------------------------------------------------------


def _rewrite(graph: fx.Graph, unfused: UnfusedAttention) -> None:
    """Replace the second product by one attention node, with dims in the order batch..., tokens, width."""
    first, end, batch, sizes = unfused.scores.product, unfused.output.node, unfused.batch, unfused.sizes
    new = Inserted(graph, end)
    query = new.arranged(*first.operand(unfused.query), [*batch, unfused.query, unfused.depth], sizes)
    key = new.arranged(*first.operand(unfused.key), [*batch, unfused.key, unfused.depth], sizes)
    value = new.arranged(unfused.value, unfused.value_labels, [*batch, unfused.key, unfused.width], sizes)
    for temperature, divides in unfused.scores.temperatures:
        query = new(aten.div.Tensor if divides else aten.mul.Tensor, query, temperature)
    dtype = query.meta["val"].dtype
    options: dict[str, Any] = {"scale": unfused.scores.factor}
    mask = _mask(new, unfused.scores, first.out_labels, [*batch, unfused.query, unfused.key], dtype)
    if mask is not None:
        options["attn_mask"] = mask
    out = new(SDPA, query, new.cast(key, dtype), new.cast(value, dtype), **options)
    out = new.cast(out, end.meta["val"].dtype)
    out = new.arranged(out, [*batch, unfused.query, unfused.width], unfused.out_labels, sizes)
    end.replace_all_uses_with(out)
    graph.erase_node(end)


def _mask(
    new: Inserted, scores: Scores, labels: tuple[str, ...], wanted: list[str], dtype: torch.dtype
) -> fx.Node | None:
    """All biases and masks as one `attn_mask`, with dims in the order `wanted`."""
    bias: fx.Node | None = None
    keep: fx.Node | None = None
    for term in scores.terms:
        node = new.regrouped(term.node, term.shape, shape_of(scores.path[0]))
        node = new.reordered(node, list(labels), wanted)
        if term.kind == "bias":
            node = new.cast(node, dtype)
            node = node if term.factor == 1 else new(aten.mul.Tensor, node, term.factor)
            bias = node if bias is None else new(aten.add.Tensor, bias, node)
        else:
            node = node if term.kind == "keep" else new(aten.logical_not.default, node)
            if term.fill == -inf:
                keep = node if keep is None else new(aten.logical_and.default, keep, node)
            else:
                bias = _filled(new, node, _filled(new, keep, bias, -inf, dtype), term.fill * term.factor, dtype)
                keep = None
    return keep if bias is None else _filled(new, keep, bias, -inf, dtype)


def _filled(
    new: Inserted, keep: fx.Node | None, bias: fx.Node | None, fill: float, dtype: torch.dtype
) -> fx.Node | None:
    """The bias, or 0 where there is none, with `fill` where `keep` is false."""
    if keep is None:
        return bias
    if bias is None:
        return new.cast(new(aten.where.Scalar, keep, 0.0, fill), dtype)
    return new(aten.where.ScalarOther, keep, bias, fill)
