"""What the experts of a layer's graph are for, told by values and not by how it was written.

rows      each row that an expert got is a row of a tensor of the layer: so (token, expert) pairs are known
sum       from some node on, all experts' outputs are in it linearly: base[t] + sum over e of w[t, e] * out_e[t],
          found by other numbers in the place of the outputs, which tell w too
routing   a tensor (tokens, k) of ids, or a map (tokens, experts), that says the same pairs
weights   a tensor with these w, (tokens, k) or (tokens, experts); or they are all one
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeca_compile.capture.idioms.choices import MisreadError
from moeca_compile.capture.idioms.routing import Reading, readings, token_ids
from moeca_compile.capture.idioms.routing import routing as chosen_routing
from moeca_compile.capture.numerics import NoExpertsError, UntrustedError, close
from moeca_compile.capture.running.experts import Experts, grouped, groups, of_group, of_grouped, without_idle
from moeca_compile.capture.running.graph import Graph

_aten = torch.ops.aten
_SORTS = (_aten.sort.default, _aten.sort.stable, _aten.topk.default)
_MOVES = (
    *(_aten.index.Tensor, _aten.index_select.default, _aten.gather.default, _aten.take_along_dim.default),
    *(_aten.index_put.default, _aten.index_add.default, _aten.index_copy.default, _aten.masked_select.default),
    *(_aten.scatter.src, _aten.scatter_add.default, _aten.scatter_reduce.two),
)
"""Ops that put rows elsewhere: by their numbers, and by places that they are given."""
DEPTHS = 8
"""How many nodes may lie between the rows that are picked and an expert's first product."""


@dataclass(frozen=True)
class Found:
    """A layer's dispatch.

    stream: its rows are what experts are given; total: the node that has the sum over experts
    base: what the sum is added to, None for zeros
    routing: ids (tokens, k) where `by_ids`, a map (tokens, experts), or the experts' choices of tokens
    weight: None where all are one; `turned` tensors have their dimensions in the other order
    """

    experts: Experts
    stream: fx.Node
    total: fx.Node
    base: fx.Node | None
    routing: Table | Choices
    by_ids: bool
    weight: Table | Choices | None
    same: dict[fx.Node, bool]


@dataclass(frozen=True)
class Table:
    """A node that holds (tokens, columns) in whatever shape; `turned`: (columns, tokens).

    each: how many tokens share a row, one after the other: all those of a sample, where whole samples are routed
    """

    node: fx.Node
    columns: int
    turned: bool
    each: int = 1

    def of(self, value: Any) -> Any:
        rows = value.reshape(self.columns, -1).t() if self.turned else value.reshape(-1, self.columns)
        return rows.repeat_interleave(self.each, 0)


@dataclass(frozen=True)
class Choices:
    """A node with the tokens that each expert takes, which lie as a reading says (idioms/routing.py), or weights."""

    node: fx.Node
    reading: Reading


@dataclass(frozen=True)
class _Pairs:
    """token and expert of each row of each piece; `routed` (tokens, experts) says the same."""

    tokens: list[Tensor]
    routed: Tensor


def find(graph: Graph, layer: nn.Module, tolerance: float) -> Found:
    """A layer's dispatch. Raises NoExpertsError where nothing is routed, UntrustedError where it is not clear how."""
    hints: list[str] = []  # what is in the way of taking these for experts
    reason = ""  # why experts are left as they are
    # Ids or counts are given to a part of a layer, and random ones may not fit its rows.
    partial = any(not graph.values[each].dtype.is_floating_point for each in graph.arguments)
    for experts in _candidates(graph, layer, hints):
        own = graph.after([piece.out for piece in experts.pieces])
        same = _same_in_another_call(graph, own)
        hints.append("what an expert is given are no rows of one tensor of the layer")
        for stream, pairs in _streams(graph, experts, same):
            missing = "no sum of its experts' weighted outputs was found"
            for total, base, weights in _totals(graph, experts, pairs, own, same, tolerance):
                try:
                    return _told(graph, experts, stream, pairs, total, base, weights, same, tolerance)
                except NoExpertsError as error:
                    missing = str(error)
                except UntrustedError as error:
                    reason = str(error)
            hints.append(missing)
            if not partial and not bool(pairs.routed.all()):
                reason = reason or missing
    if reason:
        raise UntrustedError(reason)
    raise NoExpertsError(*hints[-1:])


def _candidates(graph: Graph, layer: nn.Module, hints: list[str]) -> Iterator[Experts]:
    for products in grouped(graph).values():
        for depth in range(DEPTHS):
            found = of_grouped(graph, products, depth)
            if found is not None:
                yield found
    for group in groups(graph, layer):
        for depth in range(DEPTHS):
            try:
                found = of_group(graph, group, depth)
            except UntrustedError as error:
                if depth == 0:
                    hints.append(str(error))
                break
            if found is not None:
                yield found
                some = without_idle(found)
                if some is not None:
                    yield some


def _same_in_another_call(graph: Graph, own: set[fx.Node]) -> dict[fx.Node, bool]:
    """Whether a node is computed in the same way whatever the data, and before the experts."""
    same: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        same[node] = (
            node not in own and graph.varies(node) is None and all(same[each] for each in node.all_input_nodes)
        )
    return same


# rows


def _streams(graph: Graph, experts: Experts, same: dict[fx.Node, bool]) -> Iterator[tuple[fx.Node, _Pairs]]:
    """The tensors that all experts' rows are rows of, the nearest first. In each call their rows are of the same
    tokens: not sorted by expert, say, since caches are kept by token."""
    first = graph.values[experts.pieces[0].rows]
    moved = graph.after([node for node in graph.nodes if _moves_rows(graph, node)])
    for node in reversed(graph.before([experts.pieces[0].rows])):
        value = graph.tensor(node)
        if value is None or not same[node] or node not in graph.made_of_data or value.dtype != first.dtype:
            continue
        if node in moved or value.dim() < 2 or value.shape[-1] != first.shape[-1]:
            continue
        pairs = _pairs(graph, experts, value.reshape(-1, value.shape[-1]))
        if pairs is not None:
            yield node, pairs


def _moves_rows(graph: Graph, node: fx.Node) -> bool:
    """Whether an op puts rows of the data elsewhere, by the data."""
    if node.target in _SORTS:
        return node in graph.made_of_data
    if node.target not in _MOVES:
        return False
    data = [graph.values[each] for each in node.all_input_nodes if each in graph.made_of_data]
    moving = [value for value in data if not value.dtype.is_floating_point]
    return 0 < len(moving) < len(data)


def _pairs(graph: Graph, experts: Experts, stream: Tensor) -> _Pairs | None:
    """Which rows of the stream the experts got; None where its rows are not told apart, or one is none of them."""
    known, order = _fingerprints(stream).sort()
    if bool((known[1:] == known[:-1]).any()):
        return None
    tokens = []
    routed = torch.zeros(len(stream), len(experts.own), dtype=torch.bool, device=stream.device)
    for piece in experts.pieces:
        rows = _fingerprints(graph.values[piece.rows].reshape(-1, stream.shape[1]))
        at = torch.searchsorted(known, rows).clamp(max=len(known) - 1)
        if not torch.equal(known[at], rows):
            return None
        token, expert = order[at], piece.expert.to(stream.device)
        if bool((expert >= len(experts.own)).any()) or bool(routed[token, expert].any()):
            return None
        routed[token, expert] = True
        tokens.append(token)
    if sum(map(len, tokens)) != int(routed.sum()):
        return None
    return _Pairs(tokens, routed)


def _fingerprints(rows: Tensor) -> Tensor:
    """(tokens,) numbers that are equal for equal rows, bit by bit."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    words = rows.contiguous().view(bits).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator).to(rows.device)
    return (words * factors).sum(-1)


# the sum


def _totals(
    graph: Graph, experts: Experts, pairs: _Pairs, own: set[fx.Node], same: dict[fx.Node, bool], tolerance: float
) -> Iterator[tuple[fx.Node, fx.Node | None, Tensor]]:
    """(sum over experts, its base, the weights (tokens, experts)), the earliest sum first.

    With one expert a token, what is not weighted yet looks like a sum, too: so such come last.
    """
    unweighted = []
    outs = [piece.out for piece in experts.pieces]
    width, tokens = graph.values[outs[0]].shape[-1], len(pairs.routed)
    generator = torch.Generator().manual_seed(0)
    probes = [
        {
            node: scale * torch.randn(graph.values[node].shape, generator=generator).to(graph.values[node])
            for node in outs
        }
        for scale in (0.0, 1.0, 3.0)
    ]
    missing = {node: set(outs) for node in graph.nodes}
    again: list[dict[fx.Node, Any]] = [dict(probe) for probe in probes]
    for node in graph.nodes:
        if node in outs:
            missing[node] = missing[node] - {node}
        elif node in own:
            for env in again:
                env[node] = _again(graph, node, env)
            missing[node] = set.intersection(*(missing[each] for each in node.all_input_nodes))
            value = again[0][node]
            whole = isinstance(value, Tensor) and value.dtype.is_floating_point and value.shape[-1:] == (width,)
            if missing[node] or not whole or value.numel() != tokens * width:
                continue
            zero, one, three = (env[node].reshape(tokens, width).double() for env in again)
            weights = _weights(experts, pairs, probes[1], one - zero)
            if weights is None or not all(
                close(_summed(experts, pairs, probe, weights), got - zero, 4 * tolerance)
                for probe, got in ((probes[1], one), (probes[2], three))
            ):
                continue
            base = _base(graph, node, again[0][node], same)
            if base is not None or not bool(zero.any()):
                if _all_one(weights, pairs.routed, tolerance):
                    unweighted.append((node, base, weights))
                else:
                    yield node, base, weights
    yield from unweighted


def _all_one(weights: Tensor, routed: Tensor, tolerance: float) -> bool:
    of_pairs = weights[routed]
    return close(of_pairs, torch.ones_like(of_pairs), tolerance)


def _again(graph: Graph, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """A node's value where other nodes have the values of `env`."""

    def value(each: fx.Node) -> Any:
        return env[each] if each in env else graph.values[each]

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _outputs(
    experts: Experts, pairs: _Pairs, probe: dict[fx.Node, Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for piece, token in zip(experts.pieces, pairs.tokens, strict=True):
        yield token, piece.expert.to(token.device), probe[piece.out].double().flatten(0, -2)


def _weights(experts: Experts, pairs: _Pairs, probe: dict[fx.Node, Tensor], total: Tensor) -> Tensor | None:
    """The weights (tokens, experts) with which the outputs add up to `total`, as nearly as can be."""
    tokens, count = pairs.routed.shape
    most = int(pairs.routed.sum(1).max())
    if most > total.shape[1]:
        return None
    slot = pairs.routed.cumsum(1) - 1
    outputs = total.new_zeros(tokens, most, total.shape[1])
    for token, expert, out in _outputs(experts, pairs, probe):
        outputs[token, slot[token, expert]] = out
    unused = torch.arange(most, device=total.device) >= pairs.routed.sum(1, keepdim=True)
    products = outputs @ outputs.transpose(1, 2) + torch.diag_embed(unused.double())
    solved = torch.linalg.solve(products, outputs @ total.unsqueeze(2)).squeeze(2)
    weights = total.new_zeros(tokens, count)
    token, expert = pairs.routed.nonzero(as_tuple=True)
    weights[token, expert] = solved[token, slot[token, expert]]
    return weights


def _summed(experts: Experts, pairs: _Pairs, probe: dict[fx.Node, Tensor], weights: Tensor) -> Tensor:
    total = None
    for token, expert, out in _outputs(experts, pairs, probe):
        if total is None:
            total = out.new_zeros(len(weights), out.shape[1])
        total.index_add_(0, token, weights[token, expert, None] * out)
    assert total is not None
    return total


def _base(graph: Graph, total: fx.Node, zero: Tensor, same: dict[fx.Node, bool]) -> fx.Node | None:
    """The node that the sum starts from."""
    if not bool(zero.any()):
        return None
    for node in reversed(graph.before([total])):
        value = graph.tensor(node)
        if not same[node] or value is None or value.numel() != zero.numel() or value.shape[-1:] != zero.shape[-1:]:
            continue
        if torch.equal(value.reshape(zero.shape).to(zero), zero):
            return node
    return None


# routing and weights


def _told(
    graph: Graph,
    experts: Experts,
    stream: fx.Node,
    pairs: _Pairs,
    total: fx.Node,
    base: fx.Node | None,
    weights: Tensor,
    same: dict[fx.Node, bool],
    tolerance: float,
) -> Found:
    """The nodes that hold the routing and the weights."""
    before = [node for node in graph.before([total]) if same[node] and graph.tensor(node) is not None]
    before = _with_siblings(graph, before, total, same)
    shared = _shared_by(graph.values[stream].shape[:-1])
    if bool(pairs.routed.all()):  # all of them run on all rows, and weights of zero say which are chosen
        pairs = _Pairs(pairs.tokens, weights.abs() > tolerance * weights.abs().max())
        if bool(pairs.routed.all()):
            raise NoExpertsError("all of them get all rows")
        weights = weights.where(pairs.routed, 0)
    routing = _ids(graph, before, pairs.routed, shared)
    by_ids = routing is not None
    routing = routing or _map(graph, before, pairs.routed, shared)
    if routing is None:
        choices = _choices(graph, before, pairs.routed, weights, tolerance)
        if choices is not None:
            return Found(experts, stream, total, base, choices[0], False, choices[1], same)
        raise NoExpertsError("no tensor of the layer says which expert gets which row")
    tokens, count = pairs.routed.shape
    whole = not by_ids or routing.columns * tokens == int(pairs.routed.sum())
    if whole and _all_one(weights, pairs.routed, tolerance):
        return Found(experts, stream, total, base, routing, by_ids, None, same)
    wanted = weights
    if by_ids:
        ids = routing.of(graph.values[routing.node]).long()
        wanted = weights.gather(1, ids)
    for table in _tables(graph, [*reversed(before)], tokens, {routing.columns, count}, shared):
        value = table.of(graph.values[table.node])
        if not value.dtype.is_floating_point:
            continue
        got = value
        if by_ids and table.columns != routing.columns:
            got = value.gather(1, ids)
        elif not by_ids and table.columns == count:
            got = value.where(pairs.routed, 0)
        if got.shape == wanted.shape and close(got, wanted, 4 * tolerance):
            return Found(experts, stream, total, base, routing, by_ids, table, same)
    raise UntrustedError("no tensor of the layer holds the weights of its experts' outputs")


def _with_siblings(graph: Graph, before: list[fx.Node], total: fx.Node, same: dict[fx.Node, bool]) -> list[fx.Node]:
    """All nodes of the layer up to the sum that another call computes in the same way: a cast before, say."""
    known, place = set(before), {node: number for number, node in enumerate(graph.nodes)}
    return [
        node
        for node in graph.nodes
        if node in known or (same[node] and graph.tensor(node) is not None and place[node] < place[total])
    ]


def _ids(graph: Graph, before: list[fx.Node], routed: Tensor, shared: list[int]) -> Table | None:
    """The ids of each token's experts, of which some may get no rows: those of weight zero."""
    tokens, count, top_k = *routed.shape, int(routed.sum(1).max())
    if top_k == 0:
        return None
    for table in _tables(graph, before, tokens, {top_k}, shared):
        ids = table.of(graph.values[table.node])
        if (
            ids.dtype.is_floating_point
            or ids.dtype == torch.bool
            or bool((ids < 0).any())
            or bool((ids >= count).any())
        ):
            continue
        chosen = torch.zeros_like(routed).scatter(1, ids.long(), True)
        if int(chosen.sum()) == tokens * top_k and not bool((routed & ~chosen).any()):
            return table
    return None


def _map(graph: Graph, before: list[fx.Node], routed: Tensor, shared: list[int]) -> Table | None:
    for table in _tables(graph, before, len(routed), {routed.shape[1]}, shared):
        if torch.equal(table.of(graph.values[table.node]) != 0, routed):
            return table
    return None


def _choices(
    graph: Graph, before: list[fx.Node], routed: Tensor, weights: Tensor, tolerance: float
) -> tuple[Choices, Choices | None] | None:
    """The experts' choices of tokens, and their weights, None where all are one."""
    integers = [each for each in before if graph.values[each].dtype in (torch.int64, torch.int32)]
    for node in integers:
        index = graph.values[node]
        if index.numel() != int(routed.sum()) or node not in graph.made_of_data:
            continue
        for reading in readings():
            try:
                chosen = token_ids(index, reading, *routed.shape)
                if bool((chosen < 0).any()) or bool((chosen >= len(routed)).any()):
                    continue
                if not torch.equal(torch.zeros_like(routed).scatter(0, chosen, True), routed):
                    continue
                if _all_one(weights, routed, tolerance):
                    return Choices(node, reading), None
                for other in reversed(before):
                    value = graph.values[other]
                    if value.dtype.is_floating_point and other in graph.made_of_data:
                        with suppress(MisreadError, RuntimeError):
                            got = chosen_routing(index, value, reading, *routed.shape)[1].where(routed, 0)
                            if close(got, weights, 4 * tolerance):
                                return Choices(node, reading), Choices(other, reading)
            except (MisreadError, RuntimeError):
                continue
    return None


def _tables(graph: Graph, nodes: list[fx.Node], tokens: int, columns: set[int], shared: list[int]) -> Iterator[Table]:
    for each in shared:
        for node in nodes:
            value = graph.values[node]
            for width in sorted(columns):
                if value.numel() * each == tokens * width and node in graph.made_of_data:
                    yield Table(node, width, False, each)
                    if width > 1:
                        yield Table(node, width, True, each)


def _shared_by(shape: torch.Size) -> list[int]:
    """How many tokens of a stream (samples, ..., tokens) may share an entry: one, those of a line, of a sample."""
    return sorted({shape[dim:].numel() for dim in range(1, len(shape) + 1)})
