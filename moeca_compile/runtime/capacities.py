"""How many tokens a cache step may recompute: picks the capacity bucket of each stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeca_compile.passes.rewrite.kinds import COUNTERS, StepKind
from moeca_compile.plan import Plan
from moeca_compile.runtime.ranks import Ranks
from moeca_compile.runtime.schedule import RefreshPlan
from moeca_compile.runtime.streams import Stream

_PROMOTED_ABOVE = 1.25
"""The next steps get a larger capacity, and so another compiled graph, if a step needs this many times its own."""


class Capacities:
    """Picks the kind of each step among the plan's capacity buckets."""

    def __init__(self, plan: Plan, device: torch.device, ranks: Ranks) -> None:
        self.plan, self.device, self.ranks = plan, device, ranks

    def kind(self, refresh: RefreshPlan, stream: Stream, counts: Callable[[StepKind], Tensor | None]) -> StepKind:
        """The kind of a step. `counts` runs a step of a given kind and returns its counters (layers, COUNTERS)."""
        if refresh.experts or not self.plan.recomputes:
            return StepKind(refresh.attention, refresh.experts, group=refresh.group)
        if refresh.share is not None:
            capacity = self._bucket(refresh.share * self.plan.sizes[1]) if refresh.share else 0
            return StepKind(refresh.attention, refresh.experts, capacity, group=refresh.group)
        if stream.capacity is None:
            stream.capacity = self._first(refresh, counts)
        return StepKind(refresh.attention, refresh.experts, stream.capacity, group=refresh.group)

    def promote(self, stream: Stream, counts: Tensor | None) -> None:
        """Give the stream's next steps a larger capacity if this step needed much more than it had.

        The capacity follows the mean over samples and layers; those that need more drop their lowest-ranked tokens.
        On an accelerator reading the counters would wait for the device, so the first capacity stays; and so it does
        where ranks would have to agree on another.
        """
        several = len(self.plan.capacities) > 1 and self.device.type == "cpu" and not self.ranks.joined
        if several and counts is not None and stream.capacity is not None:
            needed = self._needed(counts)
            if needed > _PROMOTED_ABOVE * stream.capacity:
                stream.capacity = self._bucket(needed)

    def _first(self, refresh: RefreshPlan, counts: Callable[[StepKind], Tensor | None]) -> int:
        """The bucket of a stream's first cache step, by a trial step with capacity for all tokens."""
        if len(self.plan.capacities) == 1:
            return self.plan.capacities[0]
        trial = StepKind(refresh.attention, refresh.experts, self.plan.sizes[1], group=refresh.group)
        return self._bucket(self.ranks.most(self._needed(counts(trial))))

    def _needed(self, counts: Tensor | None) -> float:
        """Tokens of the main stream to recompute in one sample: the mean over samples and layers."""
        if counts is None:
            return 0.0
        samples, tokens = self.plan.sizes
        regions = self.plan.regions
        total = sum(regions.layouts[layer.marker].tokens for layer in regions.experts)
        return float(counts[:, COUNTERS.index("needed")].sum()) / (samples * total) * tokens

    def _bucket(self, needed: float) -> int:
        return next((c for c in self.plan.capacities if c >= needed), self.plan.capacities[-1])
