"""The expert cache for variable k: a token has any number of experts (expert choice, dynamic capacity).

Routing, scores and row numbers are dense over all (token, expert) pairs, (B, N, E). The outputs of the routed pairs
are rows of a pool (ops.variable_k), which has one row for each branch. Where the number of branches depends on the
data, it has `branches_per_token` rows a token; branches beyond that are computed at every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeca_compile.options import Options
from moeca_compile.passes.match.regions import Experts, Regions
from moeca_compile.passes.rewrite.kinds import Part
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies import decision as decide
from moeca_compile.policies.decision import Decision
from moeca_compile.policies.expert_cache import ExpertCache


class VariableKCache(ExpertCache):
    """The caches of one layer. `pool_row` (B, N, E) has each pair's row in the pool, counted from 1; 0 for none."""

    lookup_name, outputs_name = "pool_row", "pool"

    def __init__(self, name: str, layer: Experts, regions: Regions, options: Options) -> None:
        layout, body = regions.layouts[layer.marker], layer.body
        self.pool_rows = body.branches or round(options.branches_per_token * layout.samples * layout.tokens)
        super().__init__(name, layer, regions, options, body.experts, (self.pool_rows,))

    @property
    def lookup_is_read(self) -> bool:
        return self.forecast  # branches keep their rows

    def run_all(self, step: Step) -> Tensor:
        out, *cached = torch.ops.moeca.variable_k_outputs(
            [step[node] for node in self.layer.body.rows],
            step[self.layer.choice],
            step[self.layer.weight],
            step.state[self.lookup].flatten(0, 1) if self.forecast else None,
            [step[node] for node in self.layer.body.parameters],
            self.layer.body.key,
            self.width,
            self.pool_rows,
        )
        step.memo[self.outputs] = cached
        return out

    def store(self, step: Step) -> None:
        routed, weight = self.by_token(step[self.layer.choice]), self.by_token(step[self.layer.weight])
        pool, pool_row, norms = step.memo.pop(self.outputs)
        pool_row = self.by_token(pool_row)
        self.update_activation(step, routed)
        step.updates[self.lookup] = pool_row
        step.updates[self.weight] = self._routed_weight(routed, weight) * (pool_row > 0)
        step.updates[self.norms] = self.by_token(norms)
        self.store_outputs(step, pool)
        if self.forecast:
            self.store_history(step, (pool_row > 0) & (step.state[self.lookup] > 0))

    def decide(self, step: Step, choice: Tensor, weight: Tensor) -> Decision:
        routed = self.by_token(choice)
        matched = routed & (step.current(self.lookup) > 0)
        threshold = self.thresholds(step, routed)
        scores = self.scores(step, self._routed_weight(routed, self.by_token(weight)))
        if self.options.budget is not None:
            recompute = decide.within_budget(scores, matched, self.options.budget, routed)
        else:
            recompute = routed & (~matched | (scores > threshold[:, None, :]))
        return self.select(step, recompute, matched, scores)

    def run_chosen(self, step: Step, decision: Decision) -> Tensor:
        """As `ExpertCache.run_chosen`, with the routing of the refreshed input.

        A branch that is not cached is computed even where its token was not chosen. Experts choose among all tokens,
        so a token's cached branches cannot replace its new ones.
        """
        state = step.state
        routed, weight = self.by_token(step[self.layer.choice]), self.by_token(step[self.layer.weight])
        matched = routed & (state[self.lookup] > 0)
        chosen = torch.zeros_like(routed[..., 0]).scatter(1, decision.chosen, decision.valid)
        mask = routed & (~matched | (decision.recompute & chosen[..., None]))
        history = torch.where(mask & ~matched, 1, state[self.history]) if self.forecast else None
        forecast = step.forecast_weights(Part.EXPERTS) if self.forecast else None
        result, pool_row, norms = torch.ops.moeca.refresh_variable_k(
            self.ring_to_change(step),
            [step[node] for node in self.layer.body.rows],
            *(each.flatten(0, 1) for each in (state[self.lookup], routed, mask, weight)),
            history.flatten(0, 1) if history is not None else None,
            forecast,
            [step[node] for node in self.layer.body.parameters],
            self.layer.body.key,
        )
        if self.options.score == "staleness":
            step.updates[self.age] = state[self.age] + 1
        if self.options.overwrite:
            self._store(
                step, mask, self.by_token(pool_row), self._routed_weight(routed, weight), self.by_token(norms)
            )
            if history is not None:
                step.updates[self.history] = history
        self.count(step, decision, routed, matched, mask)
        return result.to(self.dtype)

    def observed(
        self, decision: Decision, routed: Tensor | None, chosen: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert routed is not None
        return chosen | mask.any(-1), routed

    def _store(self, step: Step, mask: Tensor, pool_row: Tensor, weight: Tensor, norms: Tensor) -> None:
        """Cache weights, norms and ages of the recomputed branches; they become 0 where a branch lost its row."""
        fresh = {self.weight: weight, self.norms: norms}
        if self.options.score == "staleness":
            fresh[self.age] = torch.zeros_like(weight)
        for name, value in fresh.items():
            step.updates[name] = torch.where(mask, value, step.current(name)) * (pool_row > 0)
        step.updates[self.lookup] = pool_row

    def _routed_weight(self, routed: Tensor, weight: Tensor) -> Tensor:
        """The weights in the form that the score compares; 0 where a pair is not routed."""
        return self.for_score(torch.where(routed, weight, 0))
