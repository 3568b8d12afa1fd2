"""The expert cache for fixed k: every token has k slots, one for each of its branches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_compile.ops.ring import by_history, weighted_sum
from moeca_compile.options import Options
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.regions import Experts, Regions
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part, Role
from moeca_compile.passes.rewrite.layers import combine, run_fixed_k
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies import decision as decide
from moeca_compile.policies.decision import Decision, Routing
from moeca_compile.policies.expert_cache import ExpertCache


@dataclass(frozen=True)
class SlotDecision(Decision):
    """A decision, with the current branches by slot that it was made from."""

    routing: Routing


class Places:
    """Where the branches in slots (..., k), given by their expert ids, lie among places (..., k)."""

    def __init__(self, slots: Tensor, places: Tensor) -> None:
        self.same = slots[..., :, None] == places[..., None, :]  # (..., slot, place), one true in each row and column

    def of_slots(self, value: Tensor) -> Tensor:
        """Values by slot (..., k) -> by place."""
        return torch.where(self.same, value[..., :, None], 0).sum(-2).to(value.dtype)

    def to_slots(self, value: Tensor) -> Tensor:
        """Values by place (..., k) -> by slot."""
        return torch.where(self.same, value[..., None, :], 0).sum(-1).to(value.dtype)


class FixedKCache(ExpertCache):
    """The caches of one layer, each (B, N, k, ...). `index` holds the expert id of the branch in each slot.

    With a forecast, outputs lie in *places*, which a branch keeps over full steps, while slots are in the router's
    order at the last one. `held` has the expert id of the branch at each place, and `history` is by place.
    """

    lookup_name, outputs_name = "index", "branches"

    def __init__(self, name: str, layer: Experts, regions: Regions, options: Options) -> None:
        layout, k = regions.layouts[layer.marker], shape_of(layer.choice)[-1]
        super().__init__(name, layer, regions, options, k, (layout.samples, layout.tokens, k))
        self.held = f"{name}.held"

    def specs(self) -> list[CacheSpec]:
        held = [self.by_branch(self.held, torch.int32, Role.ROUTING, read=True)] if self.forecast else []
        return [*super().specs(), *held]

    def run_all(self, step: Step) -> Tensor:
        index, weight = self.by_token(step[self.layer.choice]), self.by_token(step[self.layer.weight])
        placed = Routing(index, weight, index >= 0)
        if self.forecast:  # branches that are cached stay in their places, others take the places that are left
            held = torch.where(step.state[self.history] > 0, step.state[self.held], -1)
            placed = decide.match(index, weight, held)
        outputs = run_fixed_k(step, self.layer.marker, placed.index.flatten(0, 1))
        step.memo[self.outputs] = self.by_token(outputs), placed
        return combine(outputs, placed.weight.flatten(0, 1))

    def store(self, step: Step) -> None:
        branches, placed = step.memo.pop(self.outputs)
        index, weight = self.by_token(step[self.layer.choice]), self.by_token(step[self.layer.weight])
        norms = branches.norm(dim=-1).to(torch.float32)
        self.update_activation(step, self._routed(index))
        step.updates[self.lookup] = index.to(torch.int32)
        step.updates[self.weight] = self.for_score(weight)
        step.updates[self.norms] = Places(index, placed.index).to_slots(norms) if self.forecast else norms
        self.store_outputs(step, branches)
        if self.forecast:
            self.store_history(step, placed.matched)
            step.updates[self.held] = placed.index.to(torch.int32)

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

    def observed(
        self, decision: Decision, routed: Tensor | None, chosen: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(decision, SlotDecision)
        return chosen, self._routed(decision.routing.index)

    def _combine_cached(self, step: Step, weight: Tensor) -> Tensor:
        """Combine cached outputs alone. Plain ops may read the caches, since no op of this graph writes to them."""
        ring = self.ring(step)
        if not self.forecast:
            return combine(ring[0].to(self.dtype), weight)
        places = Places(step.state[self.lookup], step.state[self.held])
        weights = by_history(step.forecast_weights(Part.EXPERTS), step.state[self.history])
        return combine(weighted_sum(ring, weights[..., None, :]), places.of_slots(weight))

    def _refresh(self, step: Step, decision: SlotDecision) -> Tensor:
        chosen, valid, body = decision.chosen, decision.valid, self.layer.body
        rows = step.rows(chosen, self.layer.residual.stream, self.layer.marker)
        cached_index = _take(step.state[self.lookup], chosen)
        # The chosen tokens are routed again, on their refreshed input.
        choice, own = rows.of(self.layer.choice, self.layer.weight)
        routing = decide.match(self._chosen(choice), self._chosen(own), cached_index)
        mask = (~routing.matched | _take(decision.recompute, chosen)) & valid[..., None]
        weight = _put(decision.routing.weight, chosen, routing.weight, valid[..., None])
        inputs = [rows.aligned(node, self.layer.marker.args[0]) for node in body.rows]  # type: ignore[arg-type]
        parameters = [step[node] for node in body.parameters], body.experts, body.key
        ring = self.ring_to_change(step)
        if self.forecast:
            run = self._refresh_places(step, ring, inputs, routing, mask, chosen, weight, parameters)
        else:
            run = torch.ops.moeca.refresh_fixed_k(
                ring, inputs, routing.index, mask, chosen, weight, None, None, *parameters
            )
        result, norms = run
        if self.options.overwrite:
            self._store_rows(step, chosen, mask, routing, norms)
        self.count(step, decision, None, decision.routing.matched, mask)
        return result

    def _refresh_places(
        self,
        step: Step,
        ring: list[Tensor],
        inputs: list[Tensor],
        routing: Routing,
        mask: Tensor,
        chosen: Tensor,
        weight: Tensor,
        parameters: tuple[list[Tensor], int, str],
    ) -> tuple[Tensor, Tensor]:
        """Refresh the outputs at the places of the slots of `mask`; a branch that is new there has no history."""
        lookup, held, history = (step.state[name] for name in (self.lookup, self.held, self.history))
        places = Places(_take(lookup, chosen), _take(held, chosen))
        index, new = places.of_slots(routing.index), places.of_slots(mask & ~routing.matched)
        history = _put(history, chosen, torch.ones_like(index), new)
        if self.options.overwrite:
            step.updates[self.held] = _put(held, chosen, index, new)
            step.updates[self.history] = history
        result, norms = torch.ops.moeca.refresh_fixed_k(
            ring,
            inputs,
            index,
            places.of_slots(mask),
            chosen,
            Places(lookup, held).of_slots(weight),
            history,
            step.forecast_weights(Part.EXPERTS),
            *parameters,
        )
        return result, places.to_slots(norms)

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
