"""Plan: what is cached, in which tensors, at which costs. Frozen; nothing here edits the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil

import sympy
from torch import fx

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.analysis.axis import Axis, place_in
from moeca_compile.passes.analysis.costs import BATCH, CHOSEN, RECOMPUTED, TOKENS, symbolic_flops, token_count
from moeca_compile.passes.analysis.graph import ancestors, between, shape_of
from moeca_compile.passes.match.experts import ENTRY, body_nodes
from moeca_compile.passes.match.regions import Attention, ExpertBody, Regions
from moeca_compile.passes.rewrite.step import CacheSpec, StepKind


@dataclass(frozen=True)
class Plan:
    """The costs of one graph under one policy.

    Attributes:
        caches: every cached tensor of one stream.
        capacities: the ladder, in tokens a sample.
        costs: FLOPs of a step by which parts it computes as the model does (attention, experts): in B, N (tokens of
            the stream whose tokens are chosen), c (fraction of them chosen) and r (fraction of branches recomputed).
        sizes: the values of B and N for this graph.
    """

    caches: tuple[CacheSpec, ...]
    capacities: tuple[int, ...]
    costs: Mapping[tuple[bool, bool], sympy.Expr]
    sizes: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the caches of one stream."""
        return sum(spec.nbytes for spec in self.caches)

    def flops(self, kind: StepKind, chosen: float = 0.0, recomputed: float = 0.0) -> float:
        """FLOPs of a step at this graph's sizes."""
        values = {BATCH: self.sizes[0], TOKENS: self.sizes[1], CHOSEN: chosen, RECOMPUTED: recomputed}
        return float(self.costs[kind.attention, kind.experts].subs(values))


def plan_step(graph: fx.Graph, regions: Regions, caches: Iterable[CacheSpec], config: MoecaConfig) -> Plan:
    """Costs and capacities of the recipe on this graph."""
    sizes = (regions.main.samples, regions.main.tokens) if regions.main else (1, 1)
    parts = [(attention, experts) for attention in (True, False) for experts in (True, False)]
    counted = _outside_bodies(graph, regions)
    costs = {fresh: _cost(graph, regions, config, fresh, counted) for fresh in parts}
    return Plan(tuple(caches), _capacities(config, regions, sizes[1]), costs, sizes)


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


def _cost(
    graph: fx.Graph, regions: Regions, config: MoecaConfig, fresh: tuple[bool, bool], counted: set[fx.Node]
) -> sympy.Expr:
    """FLOPs of a step whose attention and experts are `fresh`, or come from the caches but for what is recomputed.

    Of nodes those in `counted`; the work of the others is that of the branches.
    """
    replaced, also_read = _from_caches(regions, config, fresh)
    output = next(reversed(graph.nodes))
    run = ancestors([output, *also_read], stop=replaced) - replaced
    cost = _row_flops(regions, run & counted)
    cost += _branch_flops([marker for marker in regions.bodies if marker in run], regions, config)
    return cost + (_recomputed(regions, config, replaced) if config.family == "moeca" else 0)


def _from_caches(
    regions: Regions, config: MoecaConfig, fresh: tuple[bool, bool]
) -> tuple[set[fx.Node], list[fx.Node]]:
    """The nodes whose values the policy replaces, and what it reads besides."""
    attention, experts = (not is_fresh for is_fresh in fresh)
    if config.family == "stack" and attention and experts:
        return {end for _, end in regions.stacks}, [start for start, _ in regions.stacks]
    if config.family == "fora":
        attends = {a.residual for a in regions.attentions}
        return {r.output for r in regions.residuals if (attention if r in attends else experts)}, []
    replaced: set[fx.Node] = set()
    read: list[fx.Node] = []
    if config.family == "moeca" and regions.experts and attention:
        replaced |= {a.residual.output for a in regions.attentions}
        read += [node for a in regions.attentions for node in _read_whole(a, config)]
        read += _mixed_inputs(regions, [(a.residual.stream, a.residual.output) for a in regions.attentions])
    if config.family == "moeca" and regions.experts and experts:
        replaced |= {f.output for f in regions.feedforwards} | {layer.marker for layer in regions.experts}
        replaced |= {s.output for layer in regions.experts for s in layer.shared if config.shared != "always"}
        read += [node for layer in regions.experts for node in (layer.choice, layer.weight)]
        read += _mixed_inputs(regions, [(f.stream, f.output) for f in regions.feedforwards])
        read += _mixed_inputs(regions, [(layer.residual.stream, layer.marker) for layer in regions.experts])
    return replaced, read


def _read_whole(attention: Attention, config: MoecaConfig) -> list[fx.Node]:
    """Keys and values where a cache step takes those of all tokens."""
    whole = config.keys_values == "all" or not attention.by_token
    return [attention.key, attention.value] if whole else []


def _mixed_inputs(regions: Regions, spans: list[tuple[fx.Node, fx.Node]]) -> list[fx.Node]:
    """What values that mix tokens are computed from, in these spans: it runs on all tokens whatever is chosen."""
    inside = {node for source, output in spans for node in between(source, [output]) & regions.mixed}
    return [arg for node in sorted(inside) for arg in (*node.all_input_nodes, node)]


def _whole(span: set[fx.Node], regions: Regions) -> set[fx.Node]:
    """What of `span` runs on all tokens whatever is chosen: all that leads to a value that mixes tokens."""
    return ancestors(span & regions.mixed) & span


def _recomputed(regions: Regions, config: MoecaConfig, replaced: set[fx.Node]) -> sympy.Expr:
    """What a cache step computes anew of the values that come from the caches, for chosen tokens and branches."""
    cost = sympy.Integer(0)
    for attention in regions.attentions:
        if attention.residual.output in replaced:
            span = between(attention.residual.stream, [attention.residual.output])
            run = span - ancestors(_read_whole(attention, config)) - _whole(span, regions)
            cost += CHOSEN * _chosen_flops(regions, run, attention.residual.output)
    for feedforward in regions.feedforwards:
        if feedforward.output in replaced:
            run = between(feedforward.stream, [feedforward.output])
            cost += CHOSEN * _chosen_flops(regions, run - _whole(run, regions), feedforward.output)
    for layer in regions.experts:
        if layer.marker in replaced:
            cost += RECOMPUTED * _branch_flops([layer.marker], regions, config)
            router = between(layer.residual.stream, [layer.choice, layer.weight])
            for shared in layer.shared if config.shared == "any" else ():
                run = between(shared.stream, [shared.output]) - router
                cost += CHOSEN * _chosen_flops(regions, run, shared.output)
    return cost


def _chosen_flops(regions: Regions, nodes: Iterable[fx.Node], output: fx.Node) -> sympy.Expr:
    """The work of `nodes` on the tokens among those of `output` that an MoE layer may choose."""
    axis = regions.axis(output)
    choosing = [layer.marker for layer in regions.experts if place_in(axis, regions.axis(layer.marker)) is not None]
    return _row_flops(regions, nodes, choosing[0]) if choosing else sympy.Integer(0)
