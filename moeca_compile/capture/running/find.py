"""What the experts of a layer's graph are for, told by values and not by how it was written.

rows      each row that an expert got is a row of a tensor of the layer (rows.py)
sum       from some node on, all experts' outputs are in it linearly (total.py)
routing   a tensor says the same (token, expert) pairs, and another one holds the weights of the sum (routing.py)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from moeca_compile.capture.numerics import NoExpertsError, UntrustedError
from moeca_compile.capture.running.experts import Experts, grouped, groups, of_group, of_grouped, without_idle
from moeca_compile.capture.running.graph import Graph
from moeca_compile.capture.running.routing import Told, told
from moeca_compile.capture.running.rows import moved_rows, streams
from moeca_compile.capture.running.total import totals

DEPTHS = 8
"""How many nodes may lie between the rows that are picked and an expert's first product."""


@dataclass(frozen=True)
class Found:
    """A layer's dispatch.

    stream: its rows are what experts are given; total: the node that has the sum over experts
    base: what the sum is added to, None for zeros
    told: what holds its routing and weights
    """

    experts: Experts
    stream: fx.Node
    total: fx.Node
    base: fx.Node | None
    told: Told


def find(graph: Graph, layer: nn.Module, tolerance: float) -> Found:
    """A layer's dispatch. Raises NoExpertsError where nothing is routed, UntrustedError where it is not clear how."""
    hints: list[str] = []  # what is in the way of taking these for experts
    reason = ""  # why experts are left as they are
    # Ids or counts are given to a part of a layer, and random ones may not fit its rows.
    partial = any(not graph.values[each].dtype.is_floating_point for each in graph.arguments)
    moved = moved_rows(graph)
    for experts in _candidates(graph, layer, hints):
        own = graph.after([piece.out for piece in experts.pieces])
        same = _same_in_another_call(graph, own)
        hints.append("what an expert is given are no rows of one tensor of the layer")
        for stream, pairs in streams(graph, experts, same, moved):
            missing = "no sum of its experts' weighted outputs was found"
            for total, base, weights in totals(graph, experts, pairs, own, same, tolerance):
                try:
                    routing = told(graph, stream, pairs, total, weights, same, tolerance)
                    return Found(experts, stream, total, base, routing)
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
