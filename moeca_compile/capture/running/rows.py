"""Which rows of a layer its experts got: those of one tensor, so that (token, expert) pairs are known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moeca_compile.capture.running.experts import Experts
from moeca_compile.capture.running.graph import Graph

_aten = torch.ops.aten
_SORTS = (_aten.sort.default, _aten.sort.stable, _aten.topk.default)
_MOVES = (
    *(_aten.index.Tensor, _aten.index_select.default, _aten.gather.default, _aten.take_along_dim.default),
    *(_aten.index_put.default, _aten.index_add.default, _aten.index_copy.default, _aten.masked_select.default),
    *(_aten.scatter.src, _aten.scatter_add.default, _aten.scatter_reduce.two),
)
"""Ops that put rows elsewhere: by their numbers, and by places that they are given."""
PICKS = (_aten.index.Tensor, _aten.index_select.default)
"""Those that put whole rows into another order."""


@dataclass(frozen=True)
class Pairs:
    """What each piece runs on.

    at: the places of its rows in it: padding, rows of zeros, is left out
    tokens, experts: whose those rows are, and which experts of all ranks' take them
    routed: (tokens, experts), says the same
    """

    at: list[Tensor]
    tokens: list[Tensor]
    experts: list[Tensor]
    routed: Tensor


def streams(
    graph: Graph, experts: Experts, same: dict[fx.Node, bool], moved: set[fx.Node]
) -> Iterator[tuple[fx.Node, Pairs]]:
    """The tensors that all experts' rows are rows of, the nearest first. In each call their rows are of the same
    tokens: not `moved`, sorted by expert, say, since caches are kept by token."""
    first = graph.values[experts.pieces[0].rows]
    for node in reversed(graph.before([experts.pieces[0].rows])):
        value = graph.tensor(node)
        if value is None or not same[node] or node not in graph.made_of_data or value.dtype != first.dtype:
            continue
        if node in moved or value.dim() < 2 or value.shape[-1] != first.shape[-1]:
            continue
        pairs = _pairs(graph, experts, value.reshape(-1, value.shape[-1]))
        if pairs is not None:
            yield node, pairs


def moved_rows(graph: Graph) -> set[fx.Node]:
    """All that is made of rows that the data have moved."""
    return graph.after([node for node in graph.nodes if moves_rows(graph, node)])


def moves_rows(graph: Graph, node: fx.Node) -> bool:
    """Whether an op puts rows of the data elsewhere, by the data."""
    if node.target in _SORTS:
        return node in graph.made_of_data
    if node.target not in _MOVES:
        return False
    data = [graph.values[each] for each in node.all_input_nodes if each in graph.made_of_data]
    moving = [value for value in data if not value.dtype.is_floating_point]
    return 0 < len(moving) < len(data)


def _pairs(graph: Graph, experts: Experts, stream: Tensor) -> Pairs | None:
    """Which rows of the stream the experts got; None where its rows are not told apart, or one is none of them."""
    of_ranks = [
        _fingerprints(stream * factor) if factor != 1 else _fingerprints(stream) for factor in experts.factors
    ]
    known, order = torch.cat(of_ranks).sort()
    if bool((known[1:] == known[:-1]).any()):
        return None
    found = Pairs([], [], [], torch.zeros(len(stream), experts.count, dtype=torch.bool, device=stream.device))
    for piece in experts.pieces:
        rows = graph.values[piece.rows].reshape(-1, stream.shape[1])
        at = rows.any(1).nonzero().squeeze(1) if experts.group else torch.arange(len(rows), device=rows.device)
        rows = _fingerprints(rows[at])
        place = torch.searchsorted(known, rows).clamp(max=len(known) - 1)
        if not torch.equal(known[place], rows):
            return None
        rank, token = order[place] // len(stream), order[place] % len(stream)
        expert = rank * len(experts.own) + piece.expert.to(stream.device)[at]
        if bool((expert >= experts.count).any()) or bool(found.routed[token, expert].any()):
            return None
        found.routed[token, expert] = True
        found.at.append(at)
        found.tokens.append(token)
        found.experts.append(expert)
    if sum(map(len, found.tokens)) != int(found.routed.sum()):
        return None
    return found


def _fingerprints(rows: Tensor) -> Tensor:
    """(tokens,) numbers that are equal for equal rows, bit by bit."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    words = rows.contiguous().view(bits).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator).to(rows.device)
    return (words * factors).sum(-1)
