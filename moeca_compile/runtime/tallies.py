"""Counters of the steps that ran: steps of each kind, counters of their MoE layers, and FLOPs."""

from __future__ import annotations

import math
from collections.abc import ItemsView, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.lower.program import CompiledStep
from moeca_compile.passes.analysis.graph import between, shape_of
from moeca_compile.passes.rewrite.kinds import COUNTERS, StepKind
from moeca_compile.passes.rewrite.step_function import StepFunction
from moeca_compile.plan import expected_branches

VARIABLE_K = torch.ops.moeca.experts_variable_k.default


@dataclass
class Tally:
    """The number of steps of one kind, and the sum of their counters (layers, COUNTERS)."""

    steps: int = 0
    counts: Tensor | None = None

    def mean(self, counter: str) -> list[float]:
        """The mean of a counter over the steps, for each layer."""
        if self.counts is None:
            return []
        column: list[float] = self.counts[:, COUNTERS.index(counter)].tolist()
        return [value / self.steps for value in column]


@dataclass
class Errors:
    """Relative errors of forecasts at full steps: their number and sum, and the largest."""

    number: int = 0
    sum: float = 0.0
    largest: float = 0.0

    def add(self, error: float) -> float:
        """Count an error, and return it. One that is not finite is not in the sum."""
        if math.isfinite(error):
            self.number, self.sum, self.largest = self.number + 1, self.sum + error, max(self.largest, error)
        return error


class Tallies:
    """Tallies by step kind. Counters stay on the device until a report reads them."""

    def __init__(self) -> None:
        self.by_kind: dict[StepKind, Tally] = {}
        self.forecasts = 0
        """Cache steps that ran beside full steps, for the error that they would have made."""
        self.corrections = 0
        """Full steps that made up for cache steps by such an error (runtime.corrector)."""
        self.errors = Errors()
        """The errors that decided when the next step was full (runtime.error_control)."""
        self.probes = 0
        """Probes that ran beside steps, to decide on them."""

    def add(self, kind: StepKind, counts: Tensor | None) -> None:
        """Count a step, and add its counters (layers, COUNTERS)."""
        tally = self.by_kind.get(kind)
        if tally is None:
            tally = self.by_kind.setdefault(kind, Tally())
        tally.steps += 1
        if counts is not None:
            tally.counts = counts if tally.counts is None else tally.counts + counts

    @property
    def steps(self) -> int:
        """The number of steps of all kinds."""
        return sum(tally.steps for tally in self.by_kind.values())

    def items(self) -> ItemsView[StepKind, Tally]:
        return self.by_kind.items()

    def flops(self, kind: StepKind, step: StepFunction | None, compiled: CompiledGraph) -> float:
        """FLOPs of a step of this kind, with as many branches as its steps recomputed on average.

        They are counted on the traced step. A step that runs without one (eagerly) is estimated by the plan.
        """
        tally = self.by_kind.get(kind, Tally())
        if isinstance(step, CompiledStep):
            layers = zip(compiled.regions.experts, tally.mean("recomputed"), strict=False)
            refreshed = [branches for layer, branches in layers if kind.capacity or layer.variable_k]
            return step.traced.flops.total(refreshed, _routed(kind, compiled))
        recomputed, branches = (sum(tally.mean(counter)) for counter in ("recomputed", "branches"))
        share = recomputed / branches if branches else 0.0
        return compiled.plan.flops(kind, kind.capacity / compiled.plan.sizes[1], share)


@dataclass(frozen=True)
class Counted:
    """What a report says of one set of input shapes, also after its compiled steps were dropped.

    Attributes:
        tallies: the counters by step kind.
        flops: of a step by its kind; the full step is among them, and the probe if there is one.
        uncached: FLOPs of the model itself.
    """

    tallies: Tallies
    flops: Mapping[StepKind, float]
    uncached: float


def _routed(kind: StepKind, compiled: CompiledGraph) -> list[float]:
    """The number of branches of each variable-k layer that a step of this kind runs as the model has it, for all
    tokens or for those that it chooses."""
    regions, config = compiled.regions, compiled.config
    share = dict.fromkeys((marker for marker in regions.bodies if marker.target is VARIABLE_K), 1.0)
    for replacement in compiled.plan.replacements:
        if replacement.reused_at(kind):
            chosen = replacement.share_at(kind.capacity / compiled.plan.sizes[1])
            own = chosen if replacement.recomputes_rows else 0.0
            inside = between(replacement.source, [replacement.node]) & share.keys()
            share |= dict.fromkeys(inside, own)
    run = ((marker, own) for marker, own in share.items() if own)
    return [own * expected_branches(regions.bodies[m], shape_of(m)[0], config) for m, own in run]
