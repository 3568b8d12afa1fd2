"""The cache of one MoE layer's branches: what its two layouts have in common.

With fixed k, a token has k slots, each with the output of one branch (fixed_k_cache.py). With variable k, the outputs
are rows of a pool, and every (token, expert) pair has the number of its row (variable_k_cache.py).

Shapes: B samples, N tokens, T = B * N, E experts. Values by branch are (B, N, slots), where slots is k for
fixed k and E for variable k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod

import torch
from torch import Tensor, fx

from moeca_compile.options import Options
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.regions import Experts, Regions
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part, Role, ring_specs, slot_names
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies import decision as decide
from moeca_compile.policies.decision import Decision
from moeca_compile.policies.forecast import slots_of


class ExpertCache(ABC):
    """The caches of one layer.

    With a forecast of experts, outputs are cached in a ring. A branch keeps its place from one full step to the next,
    so that its outputs have the same place in all slots of the ring. `history` counts the full steps in a row that
    have computed it, up to the number of slots. Only so many of the outputs at its place are its own, so it is read
    with the weights of a value with that history.

    Args:
        name: prefix of the cached tensors' names.
        layer, regions: the layer, and the regions of its graph.
        options: the options in force.
        slots: size of the last dim of values by branch.
        outputs: shape of the cached branch outputs without the width.
    """

    def __init__(
        self, name: str, layer: Experts, regions: Regions, options: Options, slots: int, outputs: tuple[int, ...]
    ) -> None:
        self.layer, self.options = layer, options
        self.ring_slots = slots_of(options, "experts")
        self.forecast = self.ring_slots > 1
        layout = regions.layouts[layer.marker]
        self.samples, self.tokens, self.slots = layout.samples, layout.tokens, slots
        self.width = shape_of(layer.marker)[-1]
        self.shape = (*outputs, self.width)
        self.dtype: torch.dtype = layer.marker.meta["val"].dtype
        self.lookup, self.weight, self.norms = f"{name}.{self.lookup_name}", f"{name}.weight", f"{name}.norms"
        self.outputs, self.history = f"{name}.{self.outputs_name}", f"{name}.history"
        self.activation, self.age = f"{name}.activation", f"{name}.age"

    lookup_name: str
    """Name of the int32 tensor that maps branches to cached outputs."""
    outputs_name: str
    """Name of the cached outputs."""

    @property
    def lookup_is_read(self) -> bool:
        """Whether a full step reads the lookup that it replaces."""
        return False

    def specs(self) -> list[CacheSpec]:
        """The layer's cached tensors."""
        by_expert = (self.samples, self.tokens, self.layer.body.experts)
        dtype = self.options.cache_dtype or self.dtype
        specs = [
            self.by_branch(self.lookup, torch.int32, Role.ROUTING, read=self.lookup_is_read),
            self.by_branch(self.weight, torch.float32, Role.ROUTING),
            self.by_branch(self.norms, torch.float32, Role.STATISTIC),
            CacheSpec(self.activation, by_expert, torch.float32, Role.STATISTIC),
            *ring_specs(self.outputs, self.ring_slots, self.shape, dtype, Part.EXPERTS),
        ]
        if self.forecast:
            specs.append(self.by_branch(self.history, torch.int32, Role.ROUTING, read=True))
        if self.options.score == "staleness":
            specs.append(self.by_branch(self.age, torch.float32, Role.STATISTIC))
        return specs

    def reads(self) -> list[fx.Node]:
        """What `store` reads of the graph; the outputs of the branches are in the step's memo."""
        return [self.layer.choice, self.layer.weight]

    def by_branch(self, name: str, dtype: torch.dtype, role: Role, read: bool = False) -> CacheSpec:
        """A tensor (B, N, slots); `read` says whether a step that replaces it reads it."""
        part = None if read else Part.EXPERTS
        return CacheSpec(name, (self.samples, self.tokens, self.slots), dtype, role, part, name)

    # --- full steps ---------------------------------------------------------------------------------------

    @abstractmethod
    def run_all(self, step: Step) -> Tensor:
        """Run all branches and put them into `step.memo` for `store`. Returns the layer's output (T, width)."""

    @abstractmethod
    def store(self, step: Step) -> None:
        """Cache what `run_all` computed."""

    def store_outputs(self, step: Step, outputs: Tensor) -> None:
        step.updates[self.outputs] = outputs.to(self.options.cache_dtype or outputs.dtype)
        if self.options.score == "staleness":
            step.updates[self.age] = torch.zeros_like(step.updates[self.weight])

    def store_history(self, step: Step, cached_before: Tensor) -> None:
        """Count this full step for every branch; one that was not cached before has no earlier output."""
        counted = torch.where(cached_before, step.state[self.history] + 1, 1)
        step.updates[self.history] = counted.clamp_max(self.ring_slots)

    # --- cache steps --------------------------------------------------------------------------------------

    @abstractmethod
    def decide(self, step: Step, choice: Tensor, weight: Tensor) -> Decision:
        """Decide what to recompute, from the router's current choice and weights (eqs. 7, 9 to 12)."""

    @abstractmethod
    def run_chosen(self, step: Step, decision: Decision) -> Tensor:
        """Recompute what was decided, on the refreshed input, and combine it with the cached outputs (eq. 8).

        Returns the layer's output (T, width).
        """

    def thresholds(self, step: Step, routed: Tensor) -> Tensor:
        """Update the activation statistic by the routing (B, N, E); returns the thresholds (B, E) (eqs. 10 to 12)."""
        return decide.thresholds(self.options, self.update_activation(step, routed))

    def update_activation(self, step: Step, routed: Tensor) -> Tensor:
        step.updates[self.activation] = decide.activation(self.options, step.state[self.activation], routed)
        return step.updates[self.activation]

    def scores(self, step: Step, weight: Tensor) -> Tensor:
        """Recomputation scores (eq. 9), (B, N, slots), from the weights that `for_score` returns."""
        state = step.state
        age = state[self.age] + 1 if self.options.score == "staleness" else state[self.norms]
        return decide.score(self.options, weight, state[self.weight], state[self.norms], age)

    def for_score(self, weight: Tensor) -> Tensor:
        """The weights in the form that the score compares (option `score_weights`)."""
        if self.options.score_weights == "normalized":
            weight = decide.normalized(weight)
        return weight.to(torch.float32)

    def select(self, step: Step, recompute: Tensor, matched: Tensor, scores: Tensor) -> Decision:
        return decide.select(recompute, matched, scores, step.capacity_for(self.tokens), step.kind.forced)

    def ring(self, step: Step) -> list[Tensor]:
        """The cached outputs, a tensor for each slot of the ring."""
        return [step.state[name] for name in slot_names(self.outputs, self.ring_slots)]

    def ring_to_change(self, step: Step) -> list[Tensor]:
        """The same for an op that writes to them; copies where the option `overwrite` is off."""
        ring = self.ring(step)
        return ring if self.options.overwrite else [slot.clone() for slot in ring]

    def count(self, step: Step, decision: Decision, routed: Tensor | None, matched: Tensor, mask: Tensor) -> None:
        """Add this layer's COUNTERS to the step. `routed` says which slots are branches; None for all."""
        needed = decision.recompute.any(-1).sum()
        dropped = needed - decision.valid.sum()
        total = torch.full_like(dropped, prod(matched.shape)) if routed is None else routed.sum()
        step.counts.append(torch.stack([total, matched.sum(), mask.sum(), dropped, needed]))
        if step.observer is not None:
            chosen = torch.zeros_like(matched[..., 0]).scatter(1, decision.chosen, decision.valid)
            step.observer.recomputed(self.layer.marker, *self.observed(decision, routed, chosen, mask))

    @abstractmethod
    def observed(
        self, decision: Decision, routed: Tensor | None, chosen: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The recomputed tokens (B, N) and the routing (B, N, E), from what `count` is given; `chosen` is (B, N)."""

    def by_token(self, value: Tensor) -> Tensor:
        """(T, ...) -> (B, N, ...)."""
        return value.reshape(self.samples, self.tokens, *value.shape[1:])
