"""The cache of one MoE layer's branches: expert ids, weights, outputs, norms and activation statistic by slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.regions import Experts, Regions
from moeca_compile.passes.rewrite.step import EXPERTS, CacheSpec, Step, combine, run_experts
from moeca_compile.policies import decision as decide
from moeca_compile.policies.decision import Decision, Routing


@dataclass(frozen=True)
class SlotDecision(Decision):
    """A decision with the current branches by slot."""

    routing: Routing


class FixedKCache:
    """Caches of one layer in which every token has k experts, each (B, N, k, ...) in slot order; `name` prefixes
    their names.

    With a forecast of experts a slope (B, N, k, width) is kept too: how a branch changed between the last two
    full steps, 0 where another expert held the slot.
    """

    def __init__(self, name: str, layer: Experts, regions: Regions, config: MoecaConfig) -> None:
        self.layer, self.config = layer, config
        self.forecast = "experts" in config.forecast
        layout = regions.layouts[layer.marker]
        self.samples, self.tokens = layout.samples, layout.tokens
        self.k = shape_of(layer.choice)[-1]
        self.width = shape_of(layer.marker)[-1]
        self.index, self.weight, self.norms = f"{name}.index", f"{name}.weight", f"{name}.norms"
        self.branches, self.slope = f"{name}.branches", f"{name}.branches.slope"
        self.activation, self.age = f"{name}.activation", f"{name}.age"

    def specs(self) -> list[CacheSpec]:
        """The layer's cached tensors."""
        by_slot = (self.samples, self.tokens, self.k)
        dtype = self.config.cache_dtype or self.layer.marker.meta["val"].dtype
        activation = (self.samples, self.tokens, self.layer.body.experts)
        specs = [
            CacheSpec(self.index, by_slot, torch.int32),
            CacheSpec(self.weight, by_slot, torch.float32),
            CacheSpec(self.norms, by_slot, torch.float32),
            CacheSpec(self.activation, activation, torch.float32),
            CacheSpec(self.branches, (*by_slot, self.width), dtype),
        ]
        if self.forecast:
            specs.append(CacheSpec(self.slope, (*by_slot, self.width), dtype))
        if self.config.score == "staleness":
            specs.append(CacheSpec(self.age, by_slot, torch.float32))
        return specs

    # --- full steps ---------------------------------------------------------------------------------------

    def run_all(self, step: Step) -> Tensor:
        """All branches as the model has them; they are kept for `store`. Returns the layer's (T, width)."""
        step.memo[self.branches] = run_experts(step, self.layer.marker)
        return combine(step.memo[self.branches], step[self.layer.weight])

    def store(self, step: Step) -> None:
        """Keep ids, weights, outputs and norms of the branches just computed."""
        branches = self.by_token(step.memo[self.branches])
        index, weight = self.by_token(step[self.layer.choice]), self.by_token(step[self.layer.weight])
        self.count_activation(step, index)
        dtype = self.config.cache_dtype or branches.dtype
        if self.forecast:
            step.updates[self.slope] = self._change(step, index, branches).to(dtype)
        step.updates[self.branches] = branches.to(dtype)
        step.updates[self.index] = index.to(torch.int32)
        step.updates[self.weight] = self._for_score(weight)
        step.updates[self.norms] = branches.norm(dim=-1).to(torch.float32)
        if self.config.score == "staleness":
            step.updates[self.age] = torch.zeros_like(step.state[self.age])

    def _change(self, step: Step, index: Tensor, branches: Tensor) -> Tensor:
        """Difference to the same expert's cached output; 0 where it had none or no full step came before."""
        same = index[..., :, None] == step.state[self.index][..., None, :]  # (B, N, k new, k old)
        cached = step.state[self.branches].to(branches.dtype)
        before = sum(torch.where(same[..., q, None], cached[..., q : q + 1, :], 0.0) for q in range(self.k))
        had_previous = step.clock[EXPERTS, 1].to(branches.dtype)
        return torch.where(same.any(-1, keepdim=True), branches - before, 0.0) * had_previous

    # --- cache steps --------------------------------------------------------------------------------------

    def decide(self, step: Step, choice: Tensor, weight: Tensor) -> SlotDecision:
        """What to recompute, from the current expert ids and weights, both (T, k) (eqs. 7, 9 to 12)."""
        config, index = self.config, self.by_token(choice)
        routing = decide.match(index, self.by_token(weight), step.current(self.index))
        threshold = decide.thresholds(config, self.count_activation(step, index))
        scores = self.scores(step, routing)
        if config.budget is not None:
            recompute = decide.within_budget(scores, routing.matched, config.budget)
        else:
            recompute = ~routing.matched | decide.over_threshold(scores, threshold, routing.index)
        selected = decide.select(recompute, routing.matched, scores, step.room(self.tokens), step.kind.forced)
        return SlotDecision(selected.recompute, selected.chosen, selected.valid, routing)

    def count_activation(self, step: Step, index: Tensor) -> Tensor:
        """Update the spatial activation statistic with this step's routing (eq. 10)."""
        routed = decide.routed_by_expert(index, self.layer.body.experts)
        step.updates[self.activation] = decide.activation(self.config, step.state[self.activation], routed)
        return step.updates[self.activation]

    def scores(self, step: Step, routing: Routing) -> Tensor:
        """Recomputation score of the current branches by slot (eq. 9): (B, N, k)."""
        state = step.state
        age = state[self.age] + 1 if self.config.score == "staleness" else state[self.norms]
        weight = self._for_score(routing.weight)
        return decide.score(self.config, weight, state[self.weight], state[self.norms], age)

    def run_chosen(self, step: Step, decision: SlotDecision) -> Tensor:
        """Recompute what was decided, on the refreshed input, and combine (eq. 8). Returns (T, width)."""
        if self.config.score == "staleness":
            step.updates[self.age] = step.state[self.age] + 1
        if not step.kind.capacity:
            result = self._combine_cached(step, decision.routing.weight)
            self._count(step, decision, torch.zeros_like(decision.routing.matched[:, :0]))
        else:
            result = self._refresh(step, decision)
        return result.reshape(shape_of(self.layer.marker)).to(self.layer.marker.meta["val"].dtype)

    def _combine_cached(self, step: Step, weight: Tensor) -> Tensor:
        """Nothing is recomputed in this graph, so the cache is only read and plain ops may read it."""
        dtype = self.layer.marker.meta["val"].dtype
        branches = step.state[self.branches].to(dtype)
        if self.forecast:
            branches = branches + step.clock[EXPERTS, 0].to(dtype) * step.state[self.slope].to(dtype)
        return combine(branches, weight)

    def _refresh(self, step: Step, decision: SlotDecision) -> Tensor:
        chosen, valid, body = decision.chosen, decision.valid, self.layer.body
        rows = step.rows(chosen, self.layer.residual.stream, self.layer.marker)
        cached_index = _take(step.state[self.index], chosen)
        # Chosen tokens are routed anew on their refreshed input.
        routing = decide.match(
            self._chosen(rows[self.layer.choice]), self._chosen(rows[self.layer.weight]), cached_index
        )
        mask = (~routing.matched | _take(decision.recompute, chosen)) & valid[..., None]
        weight = _put(decision.routing.weight, chosen, routing.weight, valid[..., None])
        cache, slope = step.state[self.branches], step.state[self.slope] if self.forecast else None
        if not self.config.overwrite:  # then this graph changes copies only
            cache, slope = cache.clone(), slope.clone() if slope is not None else None
        result, norms = torch.ops.moeca.refresh_fixed_k(
            cache,
            [rows.aligned(node, self.layer.marker.args[0]) for node in body.rows],  # type: ignore[arg-type]
            routing.index,
            mask,
            routing.matched,
            chosen,
            weight,
            slope,
            step.clock[EXPERTS, 0],
            [step[node] for node in body.parameters],
            body.experts,
            body.key,
        )
        if self.config.overwrite:
            self._keep_rows(step, chosen, mask, routing, norms)
        self._count(step, decision, mask)
        return result

    def _keep_rows(self, step: Step, chosen: Tensor, mask: Tensor, routing: Routing, norms: Tensor) -> None:
        fresh = {
            self.index: routing.index.to(torch.int32),
            self.weight: self._for_score(routing.weight),
            self.norms: norms,
        }
        for name, value in fresh.items():
            step.updates[name] = _put(step.state[name], chosen, value, mask)
        if self.config.score == "staleness":
            step.updates[self.age] = _put(step.updates[self.age], chosen, torch.zeros_like(norms), mask)

    def _count(self, step: Step, decision: SlotDecision, mask: Tensor) -> None:
        """Counters of this layer and step, in the order of COUNTERS."""
        matched = decision.routing.matched
        needed = decision.recompute.any(-1).sum()
        dropped = needed - decision.valid.sum()
        total = torch.full_like(dropped, matched.numel())
        step.counts.append(torch.stack([total, matched.sum(), mask.sum(), dropped, needed]))

    def _for_score(self, weight: Tensor) -> Tensor:
        if self.config.score_weights == "normalized":
            weight = decide.normalized(weight)
        return weight.to(torch.float32)

    def by_token(self, value: Tensor) -> Tensor:
        """(T, k, ...) -> (B, N, k, ...)."""
        return value.reshape(self.samples, self.tokens, *value.shape[1:])

    def _chosen(self, rows: Tensor) -> Tensor:
        """(B * C, k) -> (B, C, k)."""
        return rows.reshape(self.samples, -1, self.k)


def _take(value: Tensor, chosen: Tensor) -> Tensor:
    """(B, N, k) at tokens (B, C) -> (B, C, k)."""
    return value.gather(1, chosen[..., None].expand(-1, -1, value.shape[-1]))


def _put(value: Tensor, chosen: Tensor, rows: Tensor, where: Tensor) -> Tensor:
    """`value` (B, N, k) with `rows` (B, C, k) at the tokens `chosen`, where `where` is true."""
    index = chosen[..., None].expand(-1, -1, value.shape[-1])
    return value.scatter(1, index, torch.where(where, rows.to(value.dtype), value.gather(1, index)))
