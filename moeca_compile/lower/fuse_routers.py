"""Replace the ops of a router's choice by one op, `moeca::choose_experts`, which is one kernel.

    s = sigmoid(logits)                                            ids, w = choose_experts(logits, bias, ...)
    groups = reshape(s + bias, [T, G, E / G])
    goodness = sum(topk(groups, 2)[0], -1)
    kept = scatter(zeros(T, G), -1, topk(goodness, G / 2)[1], 1)
    ids = topk(reshape(masked_fill(groups, kept[..., None] == 0, 0), [T, E]), k)[1]
    w = gather(s, -1, ids)
    w = w / (sum(w, -1, True) + eps) * scale

The top-k is where the search starts; what is read of the ops before and after it is what `_Choice` has, and each of
them may be missing. What is not understood stays: it computes the logits, or goes on from the weights. So the op
means the same as those that it replaces, step by step and rounding by rounding (`ops.routing`). Ties are free:
torch.topk leaves their order open, and the kernel takes the lower id, as `fuse_selections` does.

For CUDA alone, and where Inductor needs several kernels: for groups of experts, and where the weights are read by id.
A softmax with a top-k is one kernel of Inductor's, with what is around it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.lower.fuse_selections import is_short_topk
from moeca_compile.lower.inlined import insert_traced
from moeca_compile.ops import triton as kernels
from moeca_compile.ops.aten import COPIES, RESHAPES, SOFTMAXES, aten
from moeca_compile.ops.routing import NONE, SIGMOID, SOFTMAX, SUM
from moeca_compile.passes.analysis.graph import argument, dtype_of, shape_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ORDERED = RESHAPES | COPIES | {aten.unsqueeze.default, aten.squeeze.dim}
"""Ops that keep the values in their order: row by row, each row's experts in order, groups beside each other."""

_ZEROS = (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default)
_MOST_GROUPS = 16
"""The kernel's code grows with the number of groups."""


@dataclass(frozen=True)
class _Choice:
    """A router's choice: its nodes, and the arguments of the op (ops.routing)."""

    topk: fx.Node
    ids: fx.Node
    logits: fx.Node
    score: fx.Node
    bias: fx.Node | None
    scores: str
    groups: int = 1
    kept_groups: int = 1
    best_of: int = 1
    fill: float = 0.0
    weights: fx.Node | None = None
    gathered: bool = False
    norm: str = NONE
    eps: float = 0.0
    scale: float = 1.0

    @property
    def k(self) -> int:
        return shape_of(self.ids)[-1]

    @property
    def pays(self) -> bool:
        """Whether Inductor makes more than one kernel of it."""
        return self.groups > 1 or self.gathered

    def op(self) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
        """The function of logits and bias that gives ids and weights in the shapes of their nodes."""
        shape, dtype = shape_of(self.ids), dtype_of(self.score)
        arguments = (
            *(self.k, self.scores, self.groups, self.kept_groups, self.best_of, self.fill, self.gathered),
            *(self.norm, self.eps, self.scale, dtype, dtype if self.weights is None else dtype_of(self.weights)),
        )

        def run(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            logits, bias = logits.reshape(-1, logits.shape[-1]), None if bias is None else bias.reshape(-1)
            ids, weights = torch.ops.moeca.choose_experts(logits, bias, *arguments)
            return ids.reshape(shape), weights.reshape(shape)

        return run


def fuse_routers(graph: fx.Graph) -> int:
    """Rewrite a traced step in place; returns the number of routers replaced."""
    topks = graph.find_nodes(op="call_function", target=aten.topk.default)
    found = [choice for topk in topks if (choice := _choice(topk)) is not None and choice.pays]
    for choice in found:
        results = insert_traced(graph, choice.topk, choice.op(), choice.logits, choice.bias)
        choice.ids.replace_all_uses_with(results[0])
        if choice.weights is not None:
            choice.weights.replace_all_uses_with(results[1])
    if found:
        graph.eliminate_dead_code()
    return len(found)


def _choice(topk: fx.Node) -> _Choice | None:
    """What the router around a top-k over experts does; None if it is something else."""
    if not is_short_topk(topk) or not kernels.available():
        return None
    results = {user.args[1]: user for user in topk.users}
    value, ids = argument(topk, 0, "self"), results.get(1)
    if ids is None or dtype_of(value) not in _DTYPES:
        return None
    experts = shape_of(value)[-1]
    base = _before_views(value)
    grouped = _grouped(base, experts)
    value = grouped.value if grouped is not None else base
    score, bias = _biased(value, experts)
    logits, scores = _scored(score)
    if any(shape_of(node)[-1:] != (experts,) for node in (score, logits)) or dtype_of(score) != dtype_of(topk):
        return None
    found = _Choice(topk, ids, logits, score, bias, scores)
    if grouped is not None:
        found = replace(
            found,
            groups=grouped.groups,
            kept_groups=grouped.kept,
            best_of=grouped.best_of,
            fill=grouped.fill,
        )
    return _with_weights(found, results.get(0))


def _before_views(node: fx.Node) -> fx.Node:
    """The node whose values these are, in the same order."""
    while node.target in _ORDERED:
        node = node.args[0]  # type: ignore[assignment]
    return node


# --- before the top-k -----------------------------------------------------------------------------------------


def _scored(score: fx.Node) -> tuple[fx.Node, str]:
    """The logits, and how they become scores."""
    if score.target is aten.sigmoid.default:
        scores = SIGMOID
    elif score.target in SOFTMAXES and argument(score, 1, "dim") in (-1, len(shape_of(score)) - 1):
        scores = SOFTMAX
    else:
        return score, NONE
    logits: Any = score.args[0]
    if logits.target is aten._to_copy.default and set(logits.kwargs) == {"dtype"}:
        source = logits.args[0]
        if dtype_of(logits) == dtype_of(score) == torch.float32 and dtype_of(source) in _DTYPES:
            logits = source  # widened, which is exact
    if dtype_of(logits) != dtype_of(score) and dtype_of(score) != torch.float32:
        return score, NONE
    return (logits, scores) if dtype_of(logits) in _DTYPES else (score, NONE)


def _biased(value: fx.Node, experts: int) -> tuple[fx.Node, fx.Node | None]:
    """(score, bias) of a sum of scores and one number for each expert; else (value, None)."""
    if value.target is aten.add.Tensor and not value.kwargs:
        for score, bias in (value.args, value.args[::-1]):
            if not isinstance(score, fx.Node) or not isinstance(bias, fx.Node):
                continue
            one_each = shape_of(bias)[-1:] == (experts,) and prod(shape_of(bias)) == experts
            if one_each and dtype_of(score) == dtype_of(value) and shape_of(score) == shape_of(value):
                return _before_views(score), bias
    return value, None


@dataclass(frozen=True)
class _Grouped:
    """Values of which a row's best groups are kept, the others replaced by `fill`."""

    value: fx.Node
    groups: int
    kept: int
    best_of: int
    fill: float


def _grouped(masked: fx.Node, experts: int) -> _Grouped | None:
    """Read `masked_fill(value, groups that are not among the best, fill)`, in any of its spellings."""
    parts = _masked(masked)
    if parts is None:
        return None
    value, condition, keeps, fill = parts
    marked = _marked(condition, shape_of(value))
    if marked is None or marked.inside != keeps:
        return None
    best = _before_views(marked.index)
    if best.target is not operator.getitem or best.args[1] != 1:
        return None
    topk: Any = best.args[0]
    if topk.target is not aten.topk.default or not is_short_topk(topk):
        return None
    goodness, kept = topk.args[:2]
    groups = shape_of(goodness)[-1]
    read = _goodness(_before_views(goodness))
    if read is None or not 1 < groups <= _MOST_GROUPS or marked.groups != groups or experts % groups:
        return None
    source, best_of = read
    size = experts // groups
    if shape_of(source)[-2:] != (groups, size) or marked.size != size or shape_of(marked.index)[-1] != kept:
        return None
    value = _before_views(value)
    if _before_views(source) is not value or dtype_of(value) != dtype_of(goodness):
        return None
    return _Grouped(value, groups, kept, best_of, fill)


def _masked(node: fx.Node) -> tuple[fx.Node, fx.Node, bool, float] | None:
    """(value, condition, whether the value stays where it is true, what stands elsewhere)."""
    arguments: Any = node.args
    if node.target is aten.masked_fill.Scalar:
        value, condition, fill = arguments
        return value, condition, False, float(fill)
    if node.target is aten.where.ScalarOther:
        condition, value, fill = arguments
        return value, condition, True, float(fill)
    if node.target is aten.where.ScalarSelf:
        condition, fill, value = arguments
        return value, condition, False, float(fill)
    return None


def _goodness(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(values by group (..., G, n), of how many of a group's greatest it is the sum)."""
    if node.target is aten.amax.default:
        return (_input(node), 1) if _over_last(node) else None
    if node.target is operator.getitem and node.args[1] == 0 and _input(node).target is aten.max.dim:
        greatest = _input(node)
        return (_input(greatest), 1) if _over_last(greatest) else None
    if node.target is not aten.sum.dim_IntList or node.kwargs or not _over_last(node):
        return None
    values = _input(node)
    if values.target is not operator.getitem or values.args[1] != 0:
        return None
    topk = _input(values)
    if topk.target is not aten.topk.default or not is_short_topk(topk):
        return None
    best_of: Any = topk.args[1]
    return (_input(topk), best_of) if best_of <= 2 else None  # three may be added up in another order


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _over_last(node: fx.Node, keepdim: bool = False) -> bool:
    """Whether a reduction is over the last dim of its input."""
    dims: Any = argument(node, 1, "dim")
    last = len(shape_of(_input(node))) - 1
    one = dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else dims
    return one in (-1, last) and bool(argument(node, 2, "keepdim", False)) == keepdim


@dataclass(frozen=True)
class _Marked:
    """Which groups are marked: those of `index`, `size` experts each; `inside` says whether they are true."""

    index: fx.Node
    groups: int
    size: int
    inside: bool


def _marked(condition: fx.Node, shape: tuple[int, ...]) -> _Marked | None:
    """Read a condition over values of `shape`: a scatter of ones at groups, spread over their experts."""
    inside, size = True, 1
    if shape_of(condition) != shape:  # broadcast
        if shape_of(condition) != (*shape[:-1], 1):
            return None
        size = shape[-1]
    node = condition
    while node.target is not aten.scatter.value:
        source: Any = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        if _negates(node, source):
            inside = not inside
        elif node.target is aten.expand.default and shape_of(source) != shape_of(node):
            if size != 1 or shape_of(source) != (*shape_of(node)[:-1], 1):
                return None
            size = shape_of(node)[-1]
        elif not (node.target in _SAME_MARKS or _compares(node, *_MORE_THAN_0)):
            return None
        node = source
    zeros, dim, index, value = node.args
    assert isinstance(zeros, fx.Node) and isinstance(index, fx.Node)
    by_row = dim in (-1, len(shape_of(node)) - 1) and shape_of(index)[:-1] == shape_of(node)[:-1]
    if not by_row or value != 1 or zeros.target not in _ZEROS:
        return None
    return _Marked(index, shape_of(node)[-1], size, inside)


_SAME_MARKS = _ORDERED | {aten._to_copy.default, aten.expand.default}
"""Ops that leave zeros and ones what they are, in any dtype."""
_MORE_THAN_0 = (aten.ne.Scalar, aten.gt.Scalar)


def _compares(node: fx.Node, *targets: object) -> bool:
    """Whether it compares with 0 by one of these ops."""
    return any(node.target is target for target in targets) and bool(node.args[1] == 0)


def _negates(node: fx.Node, source: fx.Node) -> bool:
    """Whether it is true where its source is 0."""
    bits = node.target is aten.bitwise_not.default and dtype_of(source) == torch.bool
    return bits or node.target is aten.logical_not.default or _compares(node, aten.eq.Scalar)


# --- after the top-k ------------------------------------------------------------------------------------------


def _with_weights(choice: _Choice, values: fx.Node | None) -> _Choice:
    """The choice with the weights that are read of it, as far as its op can compute them."""
    if values is not None and values.users:
        choice = replace(choice, weights=values)
    else:
        gathers = (user for user in choice.ids.users if _gathers(user, choice))
        weights = next(gathers, None)
        choice = replace(choice, weights=weights, gathered=weights is not None)
    for extended in (_normalized, _scaled, _cast):
        if choice.weights is not None:
            choice = extended(choice, choice.weights)
    return choice


def _gathers(node: fx.Node, choice: _Choice) -> bool:
    """Whether it reads the scores of the chosen experts."""
    if node.target is not aten.gather.default or node.args[2] is not choice.ids:
        return False
    source, dim = node.args[:2]
    last = dim in (-1, len(shape_of(node)) - 1)
    same_rows = shape_of(source)[:-1] == shape_of(choice.ids)[:-1]  # type: ignore[arg-type]
    return last and same_rows and _before_views(source) is choice.score  # type: ignore[arg-type]


def _normalized(choice: _Choice, weights: fx.Node) -> _Choice:
    """With the softmax of the weights, or with their division by their sum."""
    only = _only_user(weights)
    last = len(shape_of(weights)) - 1
    if only is not None and only.target in SOFTMAXES and argument(only, 1, "dim") in (-1, last):
        return replace(choice, weights=only, norm=SOFTMAX) if dtype_of(only) == dtype_of(weights) else choice
    for total in weights.users:
        if total.target is aten.sum.dim_IntList and not total.kwargs and _over_last(total, keepdim=True):
            divisor, eps = _with_number(total)
            quotient = _only_user(divisor)
            if (
                quotient is not None
                and _divides(quotient, weights, divisor)
                and weights.users.keys() == {total, quotient}
            ):
                return replace(choice, weights=quotient, norm=SUM, eps=eps)
    return choice


def _with_number(total: fx.Node) -> tuple[fx.Node, float]:
    """The sum of a node and a number, if it is used for that alone; else the node itself, and 0."""
    more = _only_user(total)
    if (
        more is None
        or more.target not in (aten.add.Tensor, aten.add.Scalar)
        or more.kwargs
        or more.args[0] is not total
    ):
        return total, 0.0
    number: Any = more.args[1]
    return (more, float(number)) if _number(number) else (total, 0.0)


def _divides(node: fx.Node, weights: fx.Node, divisor: fx.Node) -> bool:
    return node.target is aten.div.Tensor and node.args == (weights, divisor) and dtype_of(node) == dtype_of(weights)


def _scaled(choice: _Choice, weights: fx.Node) -> _Choice:
    only = _only_user(weights)
    if only is None or only.target not in (aten.mul.Tensor, aten.mul.Scalar) or not _number(only.args[1]):
        return choice
    return replace(choice, weights=only, scale=float(only.args[1]))  # type: ignore[arg-type]


def _cast(choice: _Choice, weights: fx.Node) -> _Choice:
    only = _only_user(weights)
    cast = only is not None and only.target is aten._to_copy.default and set(only.kwargs) == {"dtype"}
    return replace(choice, weights=only) if cast and dtype_of(only) in _DTYPES else choice  # type: ignore[arg-type]


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
