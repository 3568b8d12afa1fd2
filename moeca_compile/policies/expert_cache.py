"""The cache of one MoE layer's branches: what its two layouts have in common.

Where every token has k experts, branches lie in k slots a token (fixed_k_cache.py). Where tokens have no fixed number
of experts, they lie in a pool of rows, with a place for every (token, expert) pair (variable_k_cache.py). In both,
the last dim of what is kept by branch, (B, N, branches), is called that of the slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod

import torch
from torch import Tensor

from moeca_compile.options import Options
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.regions import Experts, Regions
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part, Role
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies import decision as decide
from moeca_compile.policies.decision import Decision


class ExpertCache(ABC):
    """Caches of one layer; `name` prefixes their names.

    With a forecast of experts a slope is kept for every cached output: how it changed between the last two full
    steps, 0 where the branch was not cached before.

    Args:
        slots: the last dim of what is kept by branch.
        outputs: the shape of the cached branch outputs but for the width.
    """

    def __init__(
        self, name: str, layer: Experts, regions: Regions, options: Options, slots: int, outputs: tuple[int, ...]
    ) -> None:
        self.layer, self.options = layer, options
        self.forecast = "experts" in options.forecast
        layout = regions.layouts[layer.marker]
        self.samples, self.tokens, self.slots = layout.samples, layout.tokens, slots
        self.width = shape_of(layer.marker)[-1]
        self.shape = (*outputs, self.width)
        self.dtype: torch.dtype = layer.marker.meta["val"].dtype
        self.place, self.weight, self.norms = f"{name}.{self.place_name}", f"{name}.weight", f"{name}.norms"
        self.outputs, self.slope = f"{name}.{self.outputs_name}", f"{name}.{self.outputs_name}.slope"
        self.activation, self.age = f"{name}.activation", f"{name}.age"

    place_name: str
    """What tells which branch an output belongs to."""
    outputs_name: str

    def specs(self) -> list[CacheSpec]:
        """The layer's cached tensors."""
        by_slot = (self.samples, self.tokens, self.slots)
        by_expert = (self.samples, self.tokens, self.layer.body.experts)
        dtype = self.options.cache_dtype or self.dtype
        specs = [
            CacheSpec(self.place, by_slot, torch.int32, Role.ROUTING),
            CacheSpec(self.weight, by_slot, torch.float32, Role.ROUTING),
            CacheSpec(self.norms, by_slot, torch.float32, Role.STATISTIC),
            CacheSpec(self.activation, by_expert, torch.float32, Role.STATISTIC),
            CacheSpec(self.outputs, self.shape, dtype, Role.ACTIVATION),
        ]
        if self.forecast:
            specs.append(CacheSpec(self.slope, self.shape, dtype, Role.SLOPE))
        if self.options.score == "staleness":
            specs.append(CacheSpec(self.age, by_slot, torch.float32, Role.STATISTIC))
        return specs

    # --- full steps ---------------------------------------------------------------------------------------

    @abstractmethod
    def run_all(self, step: Step) -> Tensor:
        """All branches as the model has them, kept in `step.memo` for `store`. Returns the layer's (T, width)."""

    @abstractmethod
    def store(self, step: Step) -> None:
        """Cache what `run_all` computed."""

    def store_slope(self, step: Step, outputs: Tensor, before: Tensor, known: Tensor) -> None:
        """Cache how fresh outputs differ from those `before`, where these are `known`."""
        change = torch.where(known, outputs - before, 0.0) * step.had_full_step(Part.EXPERTS).to(outputs.dtype)
        step.updates[self.slope] = change.to(self.options.cache_dtype or outputs.dtype)

    def store_outputs(self, step: Step, outputs: Tensor) -> None:
        step.updates[self.outputs] = outputs.to(self.options.cache_dtype or outputs.dtype)
        if self.options.score == "staleness":
            step.updates[self.age] = torch.zeros_like(step.state[self.age])

    # --- cache steps --------------------------------------------------------------------------------------

    @abstractmethod
    def decide(self, step: Step, choice: Tensor, weight: Tensor) -> Decision:
        """What to recompute, from the current routing as the layer's router gives it (eqs. 7, 9 to 12)."""

    @abstractmethod
    def run_chosen(self, step: Step, decision: Decision) -> Tensor:
        """Recompute what was decided, on the refreshed input, and combine (eq. 8). Returns (T, width)."""

    def thresholds(self, step: Step, routed: Tensor) -> Tensor:
        """Thresholds (B, E), after the activation statistic took note of the routing (B, N, E) (eqs. 10 to 12)."""
        return decide.thresholds(self.options, self.update_activation(step, routed))

    def update_activation(self, step: Step, routed: Tensor) -> Tensor:
        step.updates[self.activation] = decide.activation(self.options, step.state[self.activation], routed)
        return step.updates[self.activation]

    def scores(self, step: Step, weight: Tensor) -> Tensor:
        """Recomputation scores by slot (eq. 9), from weights as `for_score` gives them: (B, N, slots)."""
        state = step.state
        age = state[self.age] + 1 if self.options.score == "staleness" else state[self.norms]
        return decide.score(self.options, weight, state[self.weight], state[self.norms], age)

    def for_score(self, weight: Tensor) -> Tensor:
        """The weights that the score compares."""
        if self.options.score_weights == "normalized":
            weight = decide.normalized(weight)
        return weight.to(torch.float32)

    def select(self, step: Step, recompute: Tensor, matched: Tensor, scores: Tensor) -> Decision:
        return decide.select(recompute, matched, scores, step.capacity_for(self.tokens), step.kind.forced)

    def caches_to_change(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Cached outputs and slopes for an op that changes them in place: copies where nothing is overwritten."""
        cache, slope = step.state[self.outputs], step.state[self.slope] if self.forecast else None
        if self.options.overwrite:
            return cache, slope
        return cache.clone(), slope.clone() if slope is not None else None

    def count(self, step: Step, decision: Decision, routed: Tensor | None, matched: Tensor, mask: Tensor) -> None:
        """Note this layer's COUNTERS for the step; all slots are branches where `routed` is None."""
        needed = decision.recompute.any(-1).sum()
        dropped = needed - decision.valid.sum()
        total = torch.full_like(dropped, prod(matched.shape)) if routed is None else routed.sum()
        step.counts.append(torch.stack([total, matched.sum(), mask.sum(), dropped, needed]))

    def by_token(self, value: Tensor) -> Tensor:
        """(T, ...) -> (B, N, ...)."""
        return value.reshape(self.samples, self.tokens, *value.shape[1:])
