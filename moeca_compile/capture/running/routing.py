"""The tensors of a layer that hold its routing and weights, told by their values.

routing   (tokens, k) ids, a map (tokens, experts), or the experts' choices of tokens, which say the same pairs
weights   (tokens, k) or (tokens, experts), with which the outputs are summed; or they are all one
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from moeca_compile.capture.idioms.choices import MisreadError
from moeca_compile.capture.idioms.routing import Reading, readings, token_ids
from moeca_compile.capture.idioms.routing import routing as chosen_routing
from moeca_compile.capture.numerics import NoExpertsError, UntrustedError, close
from moeca_compile.capture.running.graph import Graph
from moeca_compile.capture.running.rows import PICKS, Pairs, moves_rows
from moeca_compile.capture.running.total import all_one


@dataclass(frozen=True)
class Table:
    """A node that holds (tokens, columns) in whatever shape; `turned`: (columns, tokens).

    each: how many tokens share a row, one after the other: all those of a sample, where whole samples are routed
    places: (tokens, columns, places), of which at most one is not zero: where experts have so many places for rows
    """

    node: fx.Node
    columns: int
    turned: bool
    each: int = 1
    places: int = 1

    def of(self, value: Any) -> Any:
        if self.places > 1:
            return value.reshape(-1, self.columns, self.places).sum(2)
        rows = value.reshape(self.columns, -1).t() if self.turned else value.reshape(-1, self.columns)
        return rows.repeat_interleave(self.each, 0)


@dataclass(frozen=True)
class Choices:
    """A node with the tokens that each expert takes, which lie as a reading says (idioms/routing.py), or weights."""

    node: fx.Node
    reading: Reading


class Told(NamedTuple):
    """What holds a layer's routing and weights.

    routing: ids (tokens, k) where `by_ids`, a map (tokens, experts), or the experts' choices of tokens
    weight: None where all are one
    """

    routing: Table | Choices
    by_ids: bool
    weight: Table | Choices | None


def told(
    graph: Graph,
    stream: fx.Node,
    pairs: Pairs,
    total: fx.Node,
    weights: Tensor,
    same: dict[fx.Node, bool],
    tolerance: float,
) -> Told:
    """The nodes that hold the routing of these pairs, and the weights (tokens, experts) of `total`.

    Raises NoExpertsError where nothing says the routing, UntrustedError where nothing holds the weights.
    """
    before = _computed_before(graph, total, same)
    shared = _shared_by(graph.values[stream].shape[:-1])
    if bool(pairs.routed.all()):  # all of them run on all rows, and weights of zero say which are chosen
        pairs = replace(pairs, routed=weights.abs() > tolerance * weights.abs().max())
        if bool(pairs.routed.all()):
            raise NoExpertsError("all of them get all rows")
        weights = weights.where(pairs.routed, 0)
    routing = _ids(graph, before, pairs.routed, shared)
    by_ids = routing is not None
    if routing is None:  # choices before a map: they say how many branches there are
        choices = _choices(graph, before, pairs.routed, weights, tolerance)
        if choices is not None:
            return Told(choices[0], False, choices[1])
        routing = _map(graph, before, pairs.routed, shared)
    if routing is None:
        raise NoExpertsError("no tensor of the layer says which expert gets which row")
    tokens, count = pairs.routed.shape
    whole = not by_ids or routing.columns * tokens == int(pairs.routed.sum())
    if whole and all_one(weights, pairs.routed, tolerance):
        return Told(routing, by_ids, None)
    wanted = weights
    if by_ids:
        ids = routing.of(graph.values[routing.node]).long()
        wanted = weights.gather(1, ids)
    tables = _tables(graph, _latest_first(graph, before), tokens, {routing.columns, count}, shared)
    for table in (*tables, *_by_places(graph, before, tokens, count)):
        value = table.of(graph.values[table.node])
        if not value.dtype.is_floating_point:
            continue
        got = value
        if by_ids and table.columns != routing.columns:
            got = value.gather(1, ids)
        elif not by_ids and table.columns == count:
            got = value.where(pairs.routed, 0)
        if got.shape == wanted.shape and close(got, wanted, 4 * tolerance):
            return Told(routing, by_ids, table)
    raise UntrustedError("no tensor of the layer holds the weights of its experts' outputs")


def _computed_before(graph: Graph, total: fx.Node, same: dict[fx.Node, bool]) -> list[fx.Node]:
    """All tensors up to the sum that another call computes in the same way: what the sum is made of, and others."""
    place = {node: number for number, node in enumerate(graph.nodes)}
    return [
        node for node in graph.nodes if same[node] and graph.tensor(node) is not None and place[node] < place[total]
    ]


def _latest_first(graph: Graph, nodes: list[fx.Node]) -> list[fx.Node]:
    """What is computed last has all of what is done to weights. Those in another order come behind: where all weights
    are one number, only one that is none would tell them from those by token."""
    ordered = graph.after([node for node in graph.nodes if node.target in PICKS and moves_rows(graph, node)])
    return sorted(reversed(nodes), key=lambda node: node in ordered)


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
    tokens, count = routed.shape
    tables = _tables(graph, before, tokens, {count}, shared)
    for table in (*tables, *_by_places(graph, before, tokens, count)):
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
                if all_one(weights, routed, tolerance):
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


def _by_places(graph: Graph, nodes: list[fx.Node], tokens: int, columns: int) -> Iterator[Table]:
    """Tables (tokens, columns, places), the last first."""
    for node in reversed(nodes):
        value = graph.values[node]
        places = value.shape[-1] if value.dim() > 2 and value.shape[-2] == columns else 0
        if places > 1 and value.numel() == tokens * columns * places and node in graph.made_of_data:
            yield Table(node, columns, False, places=places)


def _shared_by(shape: torch.Size) -> list[int]:
    """How many tokens of a stream (samples, ..., tokens) may share an entry: one, those of a line, of a sample."""
    return sorted({shape[dim:].numel() for dim in range(1, len(shape) + 1)})
