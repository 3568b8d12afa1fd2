"""The expert cache for fixed k: every token has k slots, one for each of its branches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_compile.ops.ring import by_history, weighted_sum
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
        routing = self._by_slot(step)
        outputs = run_fixed_k(step, self.layer.marker, routing.index.flatten(0, 1))
        step.memo[self.outputs] = self.by_token(outputs), routing
        return combine(outputs, routing.weight.flatten(0, 1))

    def _by_slot(self, step: Step) -> Routing:
        """The branches of a full step. With a forecast, those that are cached stay in their slots."""
        index, weight = self.by_token(step[self.layer.choice]), self.by_token(step[self.layer.weight])
        if not self.forecast:
            return Routing(index, weight, torch.zeros_like(index, dtype=torch.bool))
        cached = torch.where(step.state[self.history] > 0, step.state[self.lookup], -1)
        return decide.match(index, weight, cached)

    def store(self, step: Step) -> None:
        branches, routing = step.memo[self.outputs]
        self.update_activation(step, self._routed(routing.index))
        step.updates[self.lookup] = routing.index.to(torch.int32)
        step.updates[self.weight] = self.for_score(routing.weight)
        step.updates[self.norms] = branches.norm(dim=-1).to(torch.float32)
        self.store_outputs(step, branches)
        if self.forecast:
            self.store_history(step, routing.matched)

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
        """Combine cached outputs alone. Plain ops may read the caches, since no op of this graph writes to them."""
        ring = self.ring(step)
        if not self.forecast:
            return combine(ring[0].to(self.dtype), weight)
        weights = by_history(step.forecast_weights(Part.EXPERTS), step.state[self.history])
        return combine(weighted_sum(ring, weights[..., None, :]), weight)

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
        history = self._history(step, chosen, mask & ~routing.matched)
        result, norms = torch.ops.moeca.refresh_fixed_k(
            self.ring_to_change(step),
            [rows.aligned(node, self.layer.marker.args[0]) for node in body.rows],  # type: ignore[arg-type]
            routing.index,
            mask,
            chosen,
            weight,
            *self.history_and_weights(step, history),
            [step[node] for node in body.parameters],
            body.experts,
            body.key,
        )
        if self.options.overwrite:
            self._store_rows(step, chosen, mask, routing, norms)
            if history is not None:
                step.updates[self.history] = history
        self.count(step, decision, None, decision.routing.matched, mask)
        return result

    def _history(self, step: Step, chosen: Tensor, new: Tensor) -> Tensor | None:
        """(B, N, k) the history of each slot; of the slots `new` (B, C, k), which other branches take, only this step."""
        if not self.forecast:
            return None
        history = step.state[self.history]
        return _put(history, chosen, torch.ones_like(new, dtype=history.dtype), new)

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
