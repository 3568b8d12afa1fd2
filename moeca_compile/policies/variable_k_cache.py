"""The cache of an MoE layer in which tokens have no fixed number of experts (expert choice, dynamic capacity).

A branch is a (token, expert) pair. Routing, scores and places are dense over all pairs, (B, N, E); the outputs of
the routed ones lie in a pool of as many rows as there are branches (ops.variable_k). Where the data alone tell how
many there are, the pool has `branches_per_token` rows a token; pairs beyond it are computed at every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.regions import Experts, Regions
from moeca_compile.passes.rewrite.step import EXPERTS, CacheSpec, Step
from moeca_compile.policies import decision as decide
from moeca_compile.policies.decision import Decision


class VariableKCache:
    """Caches of one layer; `name` prefixes their names. Offers what `FixedKCache` does.

    With a forecast of experts a slope is kept for each row of the pool: how its pair's output changed between the
    last two full steps, 0 where the pair was not cached before.
    """

    def __init__(self, name: str, layer: Experts, regions: Regions, config: MoecaConfig) -> None:
        self.layer, self.config = layer, config
        self.forecast = "experts" in config.forecast
        layout = regions.layouts[layer.marker]
        self.samples, self.tokens = layout.samples, layout.tokens
        self.experts, self.width = layer.body.experts, shape_of(layer.marker)[-1]
        self.slots = layer.body.branches or round(config.branches_per_token * self.samples * self.tokens)
        self.place, self.weight, self.norms = f"{name}.place", f"{name}.weight", f"{name}.norms"
        self.activation, self.age = f"{name}.activation", f"{name}.age"
        self.pool, self.slope = f"{name}.pool", f"{name}.pool.slope"

    def specs(self) -> list[CacheSpec]:
        """The layer's cached tensors."""
        variable_k = (self.samples, self.tokens, self.experts)
        dtype = self.config.cache_dtype or self.layer.marker.meta["val"].dtype
        dense = [self.weight, self.norms, self.activation]
        specs = [CacheSpec(self.place, variable_k, torch.int32)]
        specs += [CacheSpec(name, variable_k, torch.float32) for name in dense]
        specs.append(CacheSpec(self.pool, (self.slots, self.width), dtype))
        if self.forecast:
            specs.append(CacheSpec(self.slope, (self.slots, self.width), dtype))
        if self.config.score == "staleness":
            specs.append(CacheSpec(self.age, variable_k, torch.float32))
        return specs

    # --- full steps ---------------------------------------------------------------------------------------

    def run_all(self, step: Step) -> Tensor:
        """All pairs as the model has them; they are kept for `store`. Returns the layer's (T, width)."""
        out, pool, place, norms = torch.ops.moeca.variable_k_outputs(
            [step[node] for node in self.layer.body.rows],
            step[self.layer.choice],
            step[self.layer.weight],
            [step[node] for node in self.layer.body.parameters],
            self.layer.body.key,
            self.width,
            self.slots,
        )
        step.memo |= {self.pool: pool, self.place: place, self.norms: norms}
        return out

    def store(self, step: Step) -> None:
        """Keep places, weights, outputs and norms of the pairs just computed."""
        routed, weight = self.by_token(step[self.layer.choice]), self.by_token(step[self.layer.weight])
        pool, place = step.memo[self.pool], self.by_token(step.memo[self.place])
        self._count_activation(step, routed)
        dtype = self.config.cache_dtype or pool.dtype
        if self.forecast:
            step.updates[self.slope] = self._change(step, place, pool).to(dtype)
        step.updates[self.pool] = pool.to(dtype)
        step.updates[self.place] = place
        step.updates[self.weight] = self._for_score(routed, weight) * (place > 0)
        step.updates[self.norms] = self.by_token(step.memo[self.norms])
        if self.config.score == "staleness":
            step.updates[self.age] = torch.zeros_like(step.state[self.age])

    def _change(self, step: Step, place: Tensor, pool: Tensor) -> Tensor:
        """Difference to the same pair's cached output; 0 where it had none or no full step came before."""
        before = step.state[self.place].flatten()
        row_before = torch.zeros(self.slots + 1, dtype=before.dtype, device=before.device)
        row_before = row_before.scatter(0, place.flatten().long(), before)[1:, None]  # of each row's pair
        cached = step.state[self.pool].to(pool.dtype)[(row_before[:, 0].long() - 1).clamp_min(0)]
        had_previous = step.clock[EXPERTS, 1].to(pool.dtype)
        return torch.where(row_before > 0, pool - cached, 0.0) * had_previous

    # --- cache steps --------------------------------------------------------------------------------------

    def decide(self, step: Step, choice: Tensor, weight: Tensor) -> Decision:
        """What to recompute, from the current pairs and weights, both (T, E) (eqs. 7, 9 to 12)."""
        config, routed = self.config, self.by_token(choice)
        matched = routed & (step.current(self.place) > 0)
        threshold = decide.thresholds(config, self._count_activation(step, routed))
        scores = self._scores(step, self._for_score(routed, self.by_token(weight)))
        if config.budget is not None:
            recompute = decide.within_budget(scores, matched, config.budget, routed)
        else:
            recompute = routed & (~matched | (scores > threshold[:, None, :]))
        return decide.select(recompute, matched, scores, step.room(self.tokens), step.kind.forced)

    def run_chosen(self, step: Step, decision: Decision) -> Tensor:
        """Recompute what was decided, on the refreshed input, and combine (eq. 8). Returns (T, width).

        The routing is that of the refreshed input. A pair that is not cached is computed whether its token was
        chosen or not: experts choose among all tokens, so a token's cached pairs are no stand-in for its new ones.
        """
        state, config = step.state, self.config
        routed, weight = self.by_token(step[self.layer.choice]), self.by_token(step[self.layer.weight])
        matched = routed & (state[self.place] > 0)
        chosen = torch.zeros_like(routed[..., 0]).scatter(1, decision.chosen, decision.valid)
        mask = routed & (~matched | (decision.recompute & chosen[..., None]))
        pool, slope = state[self.pool], state[self.slope] if self.forecast else None
        if not config.overwrite:  # then this graph changes copies only
            pool, slope = pool.clone(), slope.clone() if slope is not None else None
        result, place, norms = torch.ops.moeca.refresh_variable_k(
            pool,
            slope,
            [step[node] for node in self.layer.body.rows],
            *(each.flatten(0, 1) for each in (state[self.place], routed, mask, weight)),
            step.clock[EXPERTS, 0],
            [step[node] for node in self.layer.body.parameters],
            self.layer.body.key,
        )
        if config.score == "staleness":
            step.updates[self.age] = state[self.age] + 1
        if config.overwrite:
            self._keep(step, mask, self.by_token(place), self._for_score(routed, weight), self.by_token(norms))
        self._count(step, decision, routed, matched, mask)
        return result.to(self.layer.marker.meta["val"].dtype)

    def _keep(self, step: Step, mask: Tensor, place: Tensor, weight: Tensor, norms: Tensor) -> None:
        """Keep what belongs to the recomputed pairs; a pair that lost its row loses this too."""
        fresh = {self.weight: weight, self.norms: norms}
        if self.config.score == "staleness":
            fresh[self.age] = torch.zeros_like(weight)
        for name, value in fresh.items():
            step.updates[name] = torch.where(mask, value, step.current(name)) * (place > 0)
        step.updates[self.place] = place

    def _count_activation(self, step: Step, routed: Tensor) -> Tensor:
        step.updates[self.activation] = decide.activation(self.config, step.state[self.activation], routed)
        return step.updates[self.activation]

    def _scores(self, step: Step, weight: Tensor) -> Tensor:
        """Recomputation score of all pairs (eq. 9): (B, N, E); of no meaning where a pair is not routed."""
        state = step.state
        age = state[self.age] + 1 if self.config.score == "staleness" else state[self.norms]
        return decide.score(self.config, weight, state[self.weight], state[self.norms], age)

    def _for_score(self, routed: Tensor, weight: Tensor) -> Tensor:
        weight = torch.where(routed, weight, 0)
        if self.config.score_weights == "normalized":
            weight = decide.normalized(weight)
        return weight.to(torch.float32)

    def _count(self, step: Step, decision: Decision, routed: Tensor, matched: Tensor, mask: Tensor) -> None:
        """Counters of this layer and step, in the order of COUNTERS."""
        needed = decision.recompute.any(-1).sum()
        dropped = needed - decision.valid.sum()
        step.counts.append(torch.stack([routed.sum(), matched.sum(), mask.sum(), dropped, needed]))

    def by_token(self, value: Tensor) -> Tensor:
        """(T, E) -> (B, N, E)."""
        return value.reshape(self.samples, self.tokens, self.experts)
