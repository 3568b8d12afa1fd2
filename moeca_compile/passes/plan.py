"""Plan: what is cached, in which tensors, at which costs. Frozen; nothing here edits the graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

import sympy
from torch import fx

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.axis import Axis, place_in
from moeca_compile.passes.experts import ENTRY, body_nodes
from moeca_compile.passes.regions import ExpertBody, Experts, Regions, between
from moeca_compile.passes.token_axis import shape_of
from moeca_compile.policies.step import CacheSpec, StepKind
from moeca_compile.symbolic.costs import BATCH, CHOSEN, RECOMPUTED, TOKENS, symbolic_flops, token_count


@dataclass(frozen=True)
class Plan:
    """The costs of one graph under one policy.

    Attributes:
        caches: every cached tensor of one stream.
        capacities: the ladder, in tokens a sample.
        full_flops: of a full step, in B and N (tokens of the stream whose tokens are chosen).
        saved: what a cache step saves in each part (attention, experts), in B, N, c (fraction of tokens chosen)
            and r (fraction of branches recomputed).
        sizes: the values of B and N for this graph.
    """

    caches: tuple[CacheSpec, ...]
    capacities: tuple[int, ...]
    full_flops: sympy.Expr
    saved: tuple[sympy.Expr, sympy.Expr]
    sizes: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the caches of one stream."""
        return sum(spec.nbytes for spec in self.caches)

    def flops(self, kind: StepKind, chosen: float = 0.0, recomputed: float = 0.0) -> float:
        """FLOPs of a step at this graph's sizes."""
        values = {BATCH: self.sizes[0], TOKENS: self.sizes[1], CHOSEN: chosen, RECOMPUTED: recomputed}
        fresh = (kind.attention, kind.experts)
        cost = self.full_flops - sum(saved for saved, is_fresh in zip(self.saved, fresh, strict=True) if not is_fresh)
        return float(sympy.sympify(cost).subs(values))


def plan_step(graph: fx.Graph, regions: Regions, caches: Iterable[CacheSpec], config: MoecaConfig) -> Plan:
    """Costs and capacities of the recipe on this graph."""
    sizes = (regions.main.samples, regions.main.tokens) if regions.main else (1, 1)
    full = _row_flops(regions, _outside_bodies(graph, regions)) + _branch_flops(regions.bodies, regions, config)
    return Plan(tuple(caches), _capacities(config, regions, sizes[1]), full, _saved(graph, regions, config), sizes)


def _capacities(config: MoecaConfig, regions: Regions, tokens: int) -> tuple[int, ...]:
    """The ladder in tokens; a rank budget needs one rung only, and none at 0."""
    if config.budget is not None and regions.experts:
        most = max(
            expected_branches(layer.body, shape_of(layer.marker)[0], config) / shape_of(layer.marker)[0]
            for layer in regions.experts
        )
        return (min(tokens, round(config.budget * most * tokens)),)
    return tuple(sorted({ceil(fraction * tokens) for fraction in config.capacities}))


def _outside_bodies(graph: fx.Graph, regions: Regions) -> set[fx.Node]:
    """All nodes but the traced bodies of expert 0, which stand for work that the branches are counted by."""
    traced = {node for marker in regions.bodies for node in body_nodes(marker) if node.target is not ENTRY}
    return set(graph.nodes) - traced


def expected_branches(body: ExpertBody, rows: int, config: MoecaConfig) -> int:
    """(token, expert) pairs in a call on so many rows; where the data tell, what the cache has room for."""
    return body.branches or round(config.branches_per_token * rows)


def _branch_flops(markers: Iterable[fx.Node], regions: Regions, config: MoecaConfig) -> sympy.Expr:
    """FLOPs of all branches of these MoE layers."""
    total = sympy.Integer(0)
    for marker in markers:
        body, rows = regions.bodies[marker], shape_of(marker)[0]
        known = marker in regions.layouts
        tokens = BATCH * token_count(regions.axis(marker), _main(regions)) if known else rows
        total += body.flops_per_row * sympy.Rational(expected_branches(body, rows, config), rows) * tokens
    return total


def _row_flops(regions: Regions, nodes: Iterable[fx.Node], output: fx.Node | None = None) -> sympy.Expr:
    """FLOPs of `nodes`, or of their share in the tokens of `output`."""
    only = regions.axis(output) if output is not None else None
    return symbolic_flops(nodes, regions.layouts, _main(regions), only)


def _main(regions: Regions) -> Axis:
    return regions.main.axis if regions.main else ()


def _saved(graph: fx.Graph, regions: Regions, config: MoecaConfig) -> tuple[sympy.Expr, sympy.Expr]:
    """What a cache step does not compute, by part."""
    nothing = sympy.Integer(0)
    if config.family == "stack":
        # The whole stack goes at once; it counts as one part, and its steps have both parts cached.
        return _span_flops(graph, regions, list(regions.stacks), config), nothing
    if config.family == "fora":
        attention = {a.residual for a in regions.attentions}
        spans = [
            [(r.stream, r.output) for r in regions.residuals if (r in attention) == wanted]
            for wanted in (True, False)
        ]
        return _span_flops(graph, regions, spans[0], config), _span_flops(graph, regions, spans[1], config)
    if config.family == "moeca" and regions.experts:
        return _saved_attention(regions, config), _saved_experts(regions, config)
    return nothing, nothing


def _span_flops(
    graph: fx.Graph, regions: Regions, spans: list[tuple[fx.Node, fx.Node]], config: MoecaConfig
) -> sympy.Expr:
    """All work between the ends of `spans`, branches included."""
    inside: set[fx.Node] = set().union(*(between(source, [output]) for source, output in spans))
    branches = _branch_flops([marker for marker in regions.bodies if marker in inside], regions, config)
    return _row_flops(regions, inside & _outside_bodies(graph, regions)) + branches


def _saved_attention(regions: Regions, config: MoecaConfig) -> sympy.Expr:
    saved = sympy.Integer(0)
    for attention in regions.attentions:
        span = between(attention.residual.stream, [attention.residual.output])
        fresh = between(attention.residual.stream, [attention.key, attention.value])
        kept = fresh if config.keys_values == "all" else set()
        saved += _reused(regions, span - kept, attention.residual.output)
    return saved


def _saved_experts(regions: Regions, config: MoecaConfig) -> sympy.Expr:
    saved = sympy.Integer(0)
    for feedforward in regions.feedforwards:
        saved += _reused(regions, between(feedforward.stream, [feedforward.output]), feedforward.output)
    for layer in regions.experts:
        saved += (1 - RECOMPUTED) * _branch_flops([layer.marker], regions, config)
        saved += _saved_shared(layer, regions, config)
    return saved


def _saved_shared(layer: Experts, regions: Regions, config: MoecaConfig) -> sympy.Expr:
    saved = sympy.Integer(0)
    router = between(layer.residual.stream, [layer.choice, layer.weight])
    for shared in layer.shared if config.shared != "always" else ():
        nodes = between(shared.stream, [shared.output]) - router
        never = config.shared == "never"
        saved += _row_flops(regions, nodes, shared.output) if never else _reused(regions, nodes, shared.output)
    return saved


def _reused(regions: Regions, nodes: Iterable[fx.Node], output: fx.Node) -> sympy.Expr:
    """The work of `nodes` on the tokens of `output`, less what is done anew for those that an MoE layer chooses."""
    saved, axis = _row_flops(regions, nodes, output), regions.axis(output)
    choosing = [layer.marker for layer in regions.experts if place_in(axis, regions.axis(layer.marker)) is not None]
    return saved - CHOSEN * _row_flops(regions, nodes, choosing[0]) if choosing else saved
