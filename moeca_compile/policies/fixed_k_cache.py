"""The expert cache for fixed k: every token has k slots, one for each of its branches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from moeca_compile.options import Options
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.regions import Experts, Regions
from moeca_compile.passes.rewrite.kinds import Part
from moeca_compile.passes.rewrite.layers import combine, run_fixed_k
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies import decision as decide
from moeca_compile.policies.decision import Decision, Routing
from moeca_compile.policies.expert_cache import ExpertCache


@dataclass(frozen=True)
class SlotDecision(Decision):
    """A decision, with the current branches by slot that it was made from."""

    routing: Routing


class FixedKCache(ExpertCache):
    """The caches of one layer, each (B, N, k, ...). `index` holds the expert id of the branch in each slot."""

    lookup_name, outputs_name = "index", "branches"

    def __init__(self, name: str, layer: Experts, regions: Regions, options: Options) -> None:
        layout, k = regions.layouts[layer.marker], shape_of(layer.choice)[-1]
        super().__init__(name, layer, regions, options, k, (layout.samples, layout.tokens, k))

    def run_all(self, step: Step) -> Tensor:
        step.memo[self.outputs] = run_fixed_k(step, self.layer.marker)
        return combine(step.memo[self.outputs], step[self.layer.weight])

    def store(self, step: Step) -> None:
        branches = self.by_token(step.memo[self.outputs])
        index, weight = self.by_token(step[self.layer.choice]), self.by_token(step[self.layer.weight])
        self.update_activation(step, self._routed(index))
        if self.forecast:
            self.store_slope(step, branches, *self._before(step, index, branches.dtype))
        self.store_outputs(step, branches)
        step.updates[self.lookup] = index.to(torch.int32)
        step.updates[self.weight] = self.for_score(weight)
        step.updates[self.norms] = branches.norm(dim=-1).to(torch.float32)

    def _before(self, step: Step, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For each branch, the cached output of the same token and expert, and whether there is one."""
        same = index[..., :, None] == step.state[self.lookup][..., None, :]  # (B, N, k new, k old)
        cached = step.state[self.outputs].to(dtype)
        each = (torch.where(same[..., q, None], cached[..., q : q + 1, :], 0.0) for q in range(self.slots))
        return reduce(torch.add, each), same.any(-1, keepdim=True)

    def decide(self, step: Step, choice: Tensor, weight: Tensor) -> SlotDecision:
        index = self.by_token(choice)
        routing = decide.match(index, self.by_token(weight), step.current(self.lookup))
        threshold = self.thresholds(step, self._routed(index))
        scores = self.scores(step, self.for_score(routing.weight))
        if self.options.budget is not None:
            recompute = decide.within_budget(scores, routing.matched, self.options.budget)
        else:
            recompute = ~routing.matched | decide.over_threshold(scores, threshold, routing.index)
        selected = self.select(step, recompute, routing.matched, scores)
        return SlotDecision(selected.recompute, selected.chosen, selected.valid, routing)

    def run_chosen(self, step: Step, decision: Decision) -> Tensor:
        assert isinstance(decision, SlotDecision)
        if self.options.score == "staleness":
            step.updates[self.age] = step.state[self.age] + 1
        if not step.kind.capacity:
            result = self._combine_cached(step, decision.routing.weight)
            matched = decision.routing.matched
            self.count(step, decision, None, matched, torch.zeros_like(matched[:, :0]))
        else:
            result = self._refresh(step, decision)
        return result.reshape(shape_of(self.layer.marker)).to(self.dtype)

    def _combine_cached(self, step: Step, weight: Tensor) -> Tensor:
        """Combine cached outputs alone. Plain ops may read the cache, since no op of this graph writes to it."""
        branches = step.state[self.outputs].to(self.dtype)
        if self.forecast:
            distance = step.forecast_distance(Part.EXPERTS).to(self.dtype)
            branches = branches + distance * step.state[self.slope].to(self.dtype)
        return combine(branches, weight)

    def _refresh(self, step: Step, decision: SlotDecision) -> Tensor:
        chosen, valid, body = decision.chosen, decision.valid, self.layer.body
        rows = step.rows(chosen, self.layer.residual.stream, self.layer.marker)
        cached_index = _take(step.state[self.lookup], chosen)
        # The chosen tokens are routed again, on their refreshed input.
        routing = decide.match(
            self._chosen(rows[self.layer.choice]), self._chosen(rows[self.layer.weight]), cached_index
        )
        mask = (~routing.matched | _take(decision.recompute, chosen)) & valid[..., None]
        weight = _put(decision.routing.weight, chosen, routing.weight, valid[..., None])
        cache, slope = self.caches_to_change(step)
        result, norms = torch.ops.moeca.refresh_fixed_k(
            cache,
            [rows.aligned(node, self.layer.marker.args[0]) for node in body.rows],  # type: ignore[arg-type]
            routing.index,
            mask,
            routing.matched,
            chosen,
            weight,
            slope,
            step.forecast_distance(Part.EXPERTS),
            [step[node] for node in body.parameters],
            body.experts,
            body.key,
        )
        if self.options.overwrite:
            self._store_rows(step, chosen, mask, routing, norms)
        self.count(step, decision, None, decision.routing.matched, mask)
        return result

    def _store_rows(self, step: Step, chosen: Tensor, mask: Tensor, routing: Routing, norms: Tensor) -> None:
        fresh = {
            self.lookup: routing.index.to(torch.int32),
            self.weight: self.for_score(routing.weight),
            self.norms: norms,
        }
        for name, value in fresh.items():
            step.updates[name] = _put(step.state[name], chosen, value, mask)
        if self.options.score == "staleness":
            step.updates[self.age] = _put(step.updates[self.age], chosen, torch.zeros_like(norms), mask)

    def _routed(self, index: Tensor) -> Tensor:
        """Which experts a token is routed to: (B, N, k) -> (B, N, E) bool."""
        return decide.routed_by_expert(index, self.layer.body.experts)

    def _chosen(self, rows: Tensor) -> Tensor:
        """(B * C, k) -> (B, C, k)."""
        return rows.reshape(self.samples, -1, self.slots)


def _take(value: Tensor, chosen: Tensor) -> Tensor:
    """Rows of `value` (B, N, k) at the tokens `chosen` (B, C): (B, C, k)."""
    return value.gather(1, chosen[..., None].expand(-1, -1, value.shape[-1]))


def _put(value: Tensor, chosen: Tensor, rows: Tensor, where: Tensor) -> Tensor:
    """`value` (B, N, k) with the rows of the tokens `chosen` replaced by `rows` (B, C, k) where `where` is true."""
    index = chosen[..., None].expand(-1, -1, value.shape[-1])
    return value.scatter(1, index, torch.where(where, rows.to(value.dtype), value.gather(1, index)))
