"""The plan: which values a recipe caches, in which tensors, and what steps then cost. The graph is not edited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import ceil

import sympy
from torch import fx

from moeca_compile.config import MoecaConfig
from moeca_compile.ops.markers import ENTRY
from moeca_compile.passes.analysis.axis import Axis
from moeca_compile.passes.analysis.costs import (
    BATCH,
    CHOSEN,
    RECOMPUTED,
    TOKENS,
    node_flops,
    symbolic_flops,
    token_count,
)
from moeca_compile.passes.analysis.graph import ancestors, between, shape_of
from moeca_compile.passes.match.experts import body_nodes
from moeca_compile.passes.match.regions import Attention, ExpertBody, FeedForward, Regions
from moeca_compile.passes.rewrite.kinds import PROBE, REUSING, CacheSpec, Part, StepKind
from moeca_compile.passes.rewrite.probe import Probe
from moeca_compile.passes.rewrite.replacement import Replacement

SAVES_NOTHING = (
    "caching it saves no work: everything that it is computed from runs for all tokens at every step anyway"
)
_WORTH_A_GRAPH = 0.98
"""A capacity bucket is left out where its step costs more than this share of the next larger bucket's step: it saves
too little to be worth compiling."""


@dataclass(frozen=True)
class Plan:
    """What a recipe does with one graph, and what that costs.

    Attributes:
        regions: the matched regions; those where caching saves nothing are among the skipped ones.
        replacements: the values that steps take from caches; empty where the model runs uncached.
        capacities: the capacity buckets, in tokens a sample; (0,) where nothing is ever recomputed.
        costs: FLOPs of a step, by whether it runs (attention, experts) as the model does, and by its group ("" is the
            mean of all groups). Expressions in B (samples), N (tokens of the stream whose tokens are chosen), c
            (fraction of them chosen) and r (fraction of branches recomputed).
        probe: what decides whether a step is full; None where step numbers do.
        probe_cost: FLOPs of the probe, in B and N.
        sizes: the values of B and N for this graph.
        untimed: whether it lacks nothing but the time of a call, and so has no replacements.
    """

    regions: Regions
    replacements: tuple[Replacement, ...]
    capacities: tuple[int, ...]
    costs: Mapping[tuple[bool, bool, str], sympy.Expr]
    sizes: tuple[int, int]
    probe: Probe | None = None
    probe_cost: sympy.Expr = sympy.Integer(0)  # noqa: RUF009
    untimed: bool = False

    @cached_property
    def caches(self) -> tuple[CacheSpec, ...]:
        """Every cached tensor of one stream."""
        return cache_specs(self.replacements, self.probe)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches of one stream."""
        return sum(spec.nbytes for spec in self.caches)

    @cached_property
    def replaced(self) -> frozenset[fx.Node]:
        """The replaced nodes and the work between their sources and them."""
        spans = [between(replacement.source, [replacement.node]) for replacement in self.replacements]
        return frozenset(node for span in spans for node in span)

    @cached_property
    def parts(self) -> frozenset[Part]:
        """The parts of the schedule that have cached values."""
        return frozenset(replacement.part for replacement in self.replacements)

    @property
    def filling_flops(self) -> int:
        """FLOPs that a full step spends on what it caches alone, beyond the model's own work."""
        return sum(replacement.store_flops for replacement in self.replacements)

    def other_capacity(self, capacity: int) -> int | None:
        """A bucket whose cache steps differ from those of this one in sizes alone; None if there is none.

        Steps that recompute all tokens have other ops, and tensors of one token broadcast.
        """
        alike = [bucket for bucket in self.capacities if 1 < bucket < self.sizes[1]]
        return next((bucket for bucket in alike if bucket != capacity), None) if capacity in alike else None

    @cached_property
    def recomputes(self) -> bool:
        """Whether cache steps recompute chosen tokens or branches."""
        return any(replacement.recomputes for replacement in self.replacements)

    def flops(self, kind: StepKind, chosen: float = 0.0, recomputed: float = 0.0) -> float:
        """FLOPs of a step of this kind at this graph's sizes, estimated before the step is traced.

        Args:
            chosen, recomputed: the fractions of tokens chosen and of branches recomputed.
        """
        values = {BATCH: self.sizes[0], TOKENS: self.sizes[1], CHOSEN: chosen, RECOMPUTED: recomputed}
        cost = self.probe_cost if kind.probe else self.costs[kind.attention, kind.experts, kind.group]
        return float(cost.subs(values))

    @property
    def flops_beside_steps(self) -> float:
        """FLOPs of the probe that runs before each step."""
        return self.flops(PROBE) if self.probe is not None and not self.probe.after else 0.0

    @property
    def flops_handed_on(self) -> float:
        """FLOPs of the model that a full step leaves to the probe before it."""
        return self.flops(PROBE) if self.probe is not None and self.probe.handed_on else 0.0


def plan_steps(graph: fx.Graph, regions: Regions, config: MoecaConfig) -> Plan:
    """What the recipe replaces in this graph, and the costs and capacities that follow."""
    costs, replacements = _Costs(graph, regions, config), replacements_of(config, regions)
    probe = probe_of(config, regions, replacements)
    sizes = (regions.main.samples, regions.main.tokens) if regions.main else (1, 1)
    plan = Plan(regions, replacements, (0,), costs.of_steps(replacements, probe), sizes, probe, costs.of_probe(probe))
    return replace(plan, capacities=_capacities(plan, config))


def regions_that_pay(graph: fx.Graph, regions: Regions, config: MoecaConfig) -> Regions:
    """The regions for which caching can save work; the others are skipped, which is cheaper and more exact."""
    costs = _Costs(graph, regions, config)
    idle = _idle_regions(regions, [r for r in replacements_of(config, regions) if not costs.saves_work(r)])
    return regions.without(dict.fromkeys(idle, SAVES_NOTHING)) if idle else regions


def replacements_of(config: MoecaConfig, regions: Regions) -> tuple[Replacement, ...]:
    """The recipe's replacements; none where the model lacks what the recipe needs."""
    applies = regions.residuals and config.policy.applies(regions)
    return tuple(config.policy.declare(config, regions)) if applies else ()


def probe_of(config: MoecaConfig, regions: Regions, replacements: Sequence[Replacement]) -> Probe | None:
    """The probe by which the recipe decides on steps; None where it needs none, or replaces nothing."""
    decides = config.policy.decides
    return decides.probe(config, regions) if decides is not None and replacements else None


def cache_specs(replacements: Iterable[Replacement], probe: Probe | None) -> tuple[CacheSpec, ...]:
    """The tensors that are cached for these."""
    kept = probe.caches if probe is not None else ()
    return (*(spec for replacement in replacements for spec in replacement.specs), *kept)


def _idle_regions(regions: Regions, idle: Sequence[Replacement]) -> list[Attention | FeedForward]:
    """The attentions and feed-forwards whose replacements save nothing."""
    nodes = {replacement.node for replacement in idle}
    attentions = [attention for attention in regions.attentions if attention.residual.output in nodes]
    return [*attentions, *(feedforward for feedforward in regions.feedforwards if feedforward.output in nodes)]


# --- capacities ---------------------------------------------------------------------------------------------------


def _capacities(plan: Plan, config: MoecaConfig) -> tuple[int, ...]:
    """The capacity buckets in tokens. A rank budget has one only, since it fixes how much is recomputed."""
    tokens = plan.sizes[1]
    if not plan.recomputes:
        return (0,)
    if config.budget is not None:
        layers = [(layer.body, shape_of(layer.marker)[0]) for layer in plan.regions.experts]
        most = max(expected_branches(body, rows, config) / rows for body, rows in layers)
        return (min(tokens, round(config.budget * most * tokens)),)
    buckets = sorted({ceil(fraction * tokens) for fraction in config.capacities})
    kept = [buckets.pop()]
    for bucket in reversed(buckets):
        if _pays(plan, bucket, kept[0]):
            kept.insert(0, bucket)
    return tuple(kept)


def _pays(plan: Plan, capacity: int, larger: int) -> bool:
    """Whether a bucket saves enough over the next larger one to be worth compiling."""
    tokens = plan.sizes[1]
    cost, other = (plan.flops(REUSING, c / tokens, c / tokens) for c in (capacity, larger))
    return cost <= _WORTH_A_GRAPH * other


def expected_branches(body: ExpertBody, rows: int, config: MoecaConfig) -> int:
    """Branches in a call on `rows` rows; where the number depends on the data, as many as the cache holds."""
    return body.branches or round(config.branches_per_token * rows)


def _share_run(replacement: Replacement) -> sympy.Expr:
    """`Replacement.share_at` of the fraction of tokens chosen."""
    if not replacement.shares:
        return CHOSEN
    *pieces, (_, most) = replacement.shares
    return sympy.Piecewise((0, CHOSEN <= 0), *((run, largest >= CHOSEN) for largest, run in pieces), (most, True))


# --- costs --------------------------------------------------------------------------------------------------------


class _Costs:
    """FLOPs of steps over one graph, as expressions in B, N, c and r."""

    def __init__(self, graph: fx.Graph, regions: Regions, config: MoecaConfig) -> None:
        self.regions, self.config = regions, config
        self.main: Axis = regions.main.axis if regions.main else ()
        self.output = next(iter(reversed(graph.nodes)))
        # Not the traced body of expert 0: the work of experts is counted by branches.
        traced = {node for marker in regions.bodies for node in body_nodes(marker) if node.target is not ENTRY}
        self.counted = set(graph.nodes) - traced

    def of_steps(
        self, replacements: Sequence[Replacement], probe: Probe | None
    ) -> dict[tuple[bool, bool, str], sympy.Expr]:
        """FLOPs of all kinds of steps, as `Plan.costs`."""
        groups = list(dict.fromkeys(each.group for each in replacements if each.group)) or [""]
        found: dict[tuple[bool, bool, str], sympy.Expr] = {}
        for attention, experts in product((True, False), repeat=2):
            kinds = [StepKind(attention, experts, group=group) for group in groups]
            costs = [self.of_step(replacements, kind, probe) for kind in kinds]
            found |= {(attention, experts, kind.group): cost for kind, cost in zip(kinds, costs, strict=True)}
            found[attention, experts, ""] = sum(costs) / len(costs)
        return found

    def of_probe(self, probe: Probe | None) -> sympy.Expr:
        """FLOPs of the probe alone."""
        return self._whole(ancestors([*probe.reads, *probe.handed_on])) if probe is not None else sympy.Integer(0)

    def of_step(self, replacements: Sequence[Replacement], kind: StepKind, probe: Probe | None) -> sympy.Expr:
        """FLOPs of a step of this kind: what runs for all tokens, plus what is recomputed of cached values."""
        reused = [replacement for replacement in replacements if replacement.reused_at(kind)]
        run = self._run_for_all_tokens(reused, probe.handed_on if probe is not None else ())
        cost = self._whole(run)
        cost += sum(replacement.store_flops for replacement in replacements if replacement.filled_at(kind))
        for replacement in reused:
            if replacement.recomputes_rows and replacement.chosen is not None:
                span = between(replacement.source, [replacement.node])
                cost += _share_run(replacement) * self._chosen(span - run, replacement.chosen)
            if replacement.recomputes_branches:
                cost += RECOMPUTED * self._branches([replacement.node])
        return cost

    def saves_work(self, replacement: Replacement) -> bool:
        """Whether it saves any work to take the node's value from the cache, with nothing recomputed."""
        if replacement.node in self.regions.bodies:
            return True
        span = between(replacement.source, [replacement.node])
        needed = ancestors([*replacement.reads, *self._mixed_inputs(replacement)], since=replacement.source)
        left = span - needed
        return not left.isdisjoint(self.regions.bodies) or any(map(node_flops, left & self.counted))

    def _whole(self, run: Set[fx.Node]) -> sympy.Expr:
        """FLOPs of nodes that run for all tokens."""
        return self._rows(run & self.counted) + self._branches(m for m in self.regions.bodies if m in run)

    def _run_for_all_tokens(self, reused: Sequence[Replacement], handed_on: Iterable[fx.Node]) -> set[fx.Node]:
        replaced = {*handed_on, *(replacement.node for replacement in reused)}
        read = [node for replacement in reused for node in (*replacement.reads, *self._mixed_inputs(replacement))]
        return ancestors([self.output, *read], stop=replaced) - replaced

    def _mixed_inputs(self, replacement: Replacement) -> list[fx.Node]:
        """Values that mix tokens, and their inputs: these run for all tokens, whichever are chosen."""
        if not replacement.recomputes or not self.regions.mixed or self.config.budget == 0:
            return []
        mixed = between(replacement.source, [replacement.node]) & self.regions.mixed
        return [arg for node in sorted(mixed) for arg in (*node.all_input_nodes, node)]

    def _rows(self, nodes: Iterable[fx.Node], only: fx.Node | None = None) -> sympy.Expr:
        """FLOPs of `nodes`: for all tokens, or for those of `only`."""
        axis = self.regions.axis(only) if only is not None else None
        return symbolic_flops(nodes, self.regions.layouts, self.main, axis)

    def _chosen(self, nodes: Set[fx.Node], chosen: fx.Node) -> sympy.Expr:
        """FLOPs of `nodes` for the tokens of `chosen`, and of the MoE layers among them for all."""
        layers = (marker for marker in self.regions.bodies if marker in nodes)
        return self._rows(nodes & self.counted, chosen) + self._branches(layers)

    def _branches(self, markers: Iterable[fx.Node]) -> sympy.Expr:
        """FLOPs of all branches of these MoE layers."""
        total = sympy.Integer(0)
        for marker in markers:
            body, rows = self.regions.bodies[marker], shape_of(marker)[0]
            known = marker in self.regions.layouts
            tokens = BATCH * token_count(self.regions.axis(marker), self.main) if known else rows
            total += body.flops_per_row * sympy.Rational(expected_branches(body, rows, self.config), rows) * tokens
        return total
