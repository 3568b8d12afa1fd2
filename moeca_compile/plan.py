"""Plan: what is cached, in which tensors, at which costs. Frozen; nothing here edits the graph."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import ceil

import sympy
from torch import fx

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.analysis.axis import Axis, place_in
from moeca_compile.passes.analysis.costs import BATCH, CHOSEN, RECOMPUTED, TOKENS, symbolic_flops, token_count
from moeca_compile.passes.analysis.graph import ancestors, between, shape_of
from moeca_compile.passes.match.experts import ENTRY, body_nodes
from moeca_compile.passes.match.regions import Attention, ExpertBody, FeedForward, Regions
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part, StepKind
from moeca_compile.passes.rewrite.replacement import Replacement

_log = logging.getLogger(__name__)

SAVES_NOTHING = "caching it saves no work: what leads to it runs for all tokens at every step anyway"
_WORTH_A_GRAPH = 0.98
"""A capacity bucket whose step costs more than this share of the next one's is left out: it would be a graph more to
compile for next to nothing."""


@dataclass(frozen=True)
class Plan:
    """What a recipe does with one graph, and what that costs.

    Attributes:
        regions: the regions that it goes by; those that caching cannot pay for are among the skipped ones.
        replacements: what steps take from caches; empty where the model runs uncached.
        capacities: the capacity buckets, in tokens a sample; (0,) where nothing is ever recomputed.
        costs: FLOPs of a step by which parts it computes as the model does (attention, experts): in B, N (tokens of
            the stream whose tokens are chosen), c (fraction of them chosen) and r (fraction of branches recomputed).
        sizes: the values of B and N for this graph.
    """

    regions: Regions
    replacements: tuple[Replacement, ...]
    capacities: tuple[int, ...]
    costs: Mapping[tuple[bool, bool], sympy.Expr]
    sizes: tuple[int, int]

    @cached_property
    def caches(self) -> tuple[CacheSpec, ...]:
        """Every cached tensor of one stream."""
        return tuple(spec for replacement in self.replacements for spec in replacement.specs)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches of one stream."""
        return sum(spec.nbytes for spec in self.caches)

    @cached_property
    def replaced(self) -> frozenset[fx.Node]:
        """The nodes whose own values no step needs that reads the caches: the replaced ones and all that leads to
        them alone."""
        spans = [between(replacement.source, [replacement.node]) for replacement in self.replacements]
        return frozenset(node for span in spans for node in span)

    @cached_property
    def parts(self) -> frozenset[Part]:
        """The parts of the schedule that something is cached of."""
        return frozenset(replacement.part for replacement in self.replacements)

    @cached_property
    def recomputes(self) -> bool:
        """Whether cache steps compute chosen tokens or branches anew."""
        return any(replacement.recomputes for replacement in self.replacements)

    def flops(self, kind: StepKind, chosen: float = 0.0, recomputed: float = 0.0) -> float:
        """FLOPs of a step at this graph's sizes, before it is traced."""
        values = {BATCH: self.sizes[0], TOKENS: self.sizes[1], CHOSEN: chosen, RECOMPUTED: recomputed}
        return float(self.costs[kind.attention, kind.experts].subs(values))


def plan_steps(graph: fx.Graph, regions: Regions, config: MoecaConfig) -> Plan:
    """What the recipe replaces in this graph, and the costs and capacities that follow."""
    costs = _Costs(graph, regions, config)
    replacements = declare(config, regions)
    idle = _idle_regions(regions, [r for r in replacements if not costs.saves_work(r)])
    if idle:
        _log.debug("caching saves nothing at %s", ", ".join(region.name for region in idle))
        regions = regions.without(dict.fromkeys(idle, SAVES_NOTHING))
        costs, replacements = _Costs(graph, regions, config), declare(config, regions)
    kinds = [StepKind(attention, experts) for attention in (True, False) for experts in (True, False)]
    by_parts = {(kind.attention, kind.experts): costs.of_step(replacements, kind) for kind in kinds}
    sizes = (regions.main.samples, regions.main.tokens) if regions.main else (1, 1)
    plan = Plan(regions, replacements, (0,), by_parts, sizes)
    return replace(plan, capacities=_capacities(plan, config))


def declare(config: MoecaConfig, regions: Regions) -> tuple[Replacement, ...]:
    """What the recipe takes from caches; nothing where the model does not have what it needs."""
    applies = regions.residuals and config.policy.applies(regions)
    return tuple(config.policy.declare(config, regions)) if applies else ()


def _idle_regions(regions: Regions, idle: Sequence[Replacement]) -> list[Attention | FeedForward]:
    """The attentions and feed-forwards behind replacements that save nothing."""
    nodes = {replacement.node for replacement in idle}
    attentions = [attention for attention in regions.attentions if attention.residual.output in nodes]
    return [*attentions, *(feedforward for feedforward in regions.feedforwards if feedforward.output in nodes)]


# --- capacities ---------------------------------------------------------------------------------------------------


def _capacities(plan: Plan, config: MoecaConfig) -> tuple[int, ...]:
    """The capacity buckets in tokens; a rank budget needs one only, and none at 0."""
    tokens = plan.sizes[1]
    if not plan.recomputes:
        return (0,)
    if config.budget is not None:
        layers = [(layer.body, shape_of(layer.marker)[0]) for layer in plan.regions.experts]
        most = max(expected_branches(body, rows, config) / rows for body, rows in layers)
        return (min(tokens, round(config.budget * most * tokens)),)
    buckets = sorted({ceil(fraction * tokens) for fraction in config.capacities})
    smaller = [one for one, larger in pairwise(buckets) if _pays(plan, one, larger)]
    return (*smaller, buckets[-1])


def _pays(plan: Plan, capacity: int, larger: int) -> bool:
    """Whether a bucket saves enough over the next larger one to be a graph of its own."""
    kind, tokens = StepKind(attention=False, experts=False), plan.sizes[1]
    cost, other = (plan.flops(kind, c / tokens, c / tokens) for c in (capacity, larger))
    return cost <= _WORTH_A_GRAPH * other


def expected_branches(body: ExpertBody, rows: int, config: MoecaConfig) -> int:
    """Branches in a call on so many rows; where the data tell, as many as the cache has room for."""
    return body.branches or round(config.branches_per_token * rows)


# --- costs --------------------------------------------------------------------------------------------------------


class _Costs:
    """FLOPs of steps over one graph, as expressions in B, N, c and r."""

    def __init__(self, graph: fx.Graph, regions: Regions, config: MoecaConfig) -> None:
        self.regions, self.config = regions, config
        self.main: Axis = regions.main.axis if regions.main else ()
        self.output = next(iter(reversed(graph.nodes)))
        # The traced body of expert 0 stands for work that the branches are counted by.
        traced = {node for marker in regions.bodies for node in body_nodes(marker) if node.target is not ENTRY}
        self.counted = set(graph.nodes) - traced

    def of_step(self, replacements: Iterable[Replacement], kind: StepKind) -> sympy.Expr:
        """A step of this kind: what runs for all tokens, and what it computes anew of what comes from caches."""
        reused = [replacement for replacement in replacements if not kind.computes(replacement.part)]
        run = self._run_for_all_tokens(reused)
        cost = self._rows(run & self.counted) + self._branches(m for m in self.regions.bodies if m in run)
        for replacement in reused:
            if replacement.recomputes_rows:
                span = between(replacement.source, [replacement.node])
                cost += CHOSEN * self._chosen(span - run, replacement.node)
            if replacement.recomputes_branches:
                cost += RECOMPUTED * self._branches([replacement.node])
        return cost

    def saves_work(self, replacement: Replacement) -> bool:
        """Whether any work falls away where the node's value comes from the cache and nothing is recomputed."""
        if replacement.node in self.regions.bodies:
            return True
        span = between(replacement.source, [replacement.node])
        needed = ancestors([*replacement.reads, *self._mixed_inputs(replacement)], since=replacement.source)
        left = span - needed
        return bool(left & set(self.regions.bodies)) or self._rows(left & self.counted) != 0

    def _run_for_all_tokens(self, reused: Sequence[Replacement]) -> set[fx.Node]:
        replaced = {replacement.node for replacement in reused}
        read = [node for replacement in reused for node in (*replacement.reads, *self._mixed_inputs(replacement))]
        return ancestors([self.output, *read], stop=replaced) - replaced

    def _mixed_inputs(self, replacement: Replacement) -> list[fx.Node]:
        """What values that mix tokens are computed from: it runs for all tokens whatever is chosen."""
        if not replacement.recomputes or not self.regions.mixed or self.config.budget == 0:
            return []
        mixed = between(replacement.source, [replacement.node]) & self.regions.mixed
        return [arg for node in sorted(mixed) for arg in (*node.all_input_nodes, node)]

    def _rows(self, nodes: Iterable[fx.Node], only: fx.Node | None = None) -> sympy.Expr:
        """The work of `nodes`, or of their share in the tokens of `only`."""
        axis = self.regions.axis(only) if only is not None else None
        return symbolic_flops(nodes, self.regions.layouts, self.main, axis)

    def _chosen(self, nodes: Iterable[fx.Node], output: fx.Node) -> sympy.Expr:
        """The work of `nodes` on the tokens among those of `output` that an MoE layer may choose."""
        axis, markers = self.regions.axis(output), [layer.marker for layer in self.regions.experts]
        choosing = [marker for marker in markers if place_in(axis, self.regions.axis(marker)) is not None]
        return self._rows(nodes, choosing[0]) if choosing else sympy.Integer(0)

    def _branches(self, markers: Iterable[fx.Node]) -> sympy.Expr:
        """All branches of these MoE layers."""
        total = sympy.Integer(0)
        for marker in markers:
            body, rows = self.regions.bodies[marker], shape_of(marker)[0]
            known = marker in self.regions.layouts
            tokens = BATCH * token_count(self.regions.axis(marker), self.main) if known else rows
            total += body.flops_per_row * sympy.Rational(expected_branches(body, rows, self.config), rows) * tokens
        return total
