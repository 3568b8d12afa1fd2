"""MoECa over any model of blocks.py, as plain loops: what compiled generations are held against.

It knows a model's pieces (each block's attention, router, experts) as plain functions, and nothing of the compiler.
The equations are those of tests/policies/reference_moeca.py, with the readings noted there. What more than one kind
of model asks for:

- A MoE layer has a probe if it reads the stream right after a cached attention. Without one it decides on its own
  router, after whatever stands before it has run.
- `Understood` says which parts the compiler is expected to cache; all others run as the model has them, on the
  current stream.
- A forecast reaches (t - t_last) / (t_last - t_before), t being the timesteps of the full steps.
- Chosen tokens are routed again on their refreshed input; slots that get another expert by that are recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moeca_compile.config import MoecaConfig
from tests.policies.reference_moeca import (
    Decision,
    branch_scores,
    expert_thresholds,
    match,
    over_threshold,
    score_weights,
    update_statistic,
    within_budget,
)
from tests.variants.blocks import Block, Context, Model
from tests.variants.conditioning import Modulation
from tests.variants.dispatch import Layer
from tests.variants.pair_simulation import Pool, cached_pairs, decide_pairs, full_pairs
from tests.variants.pairs import PairLayer
from tests.variants.ranking import EDGES, first_tokens, ranks_are_close


@dataclass(frozen=True)
class Understood:
    """Which parts of each block are cached, by block: its attention, its feed-forward (dense or MoE)."""

    attention: tuple[bool, ...]
    feedforward: tuple[bool, ...]


@dataclass
class Cached:
    """A cached tensor: its value at the last full step and how it changed since the one before, if forecast."""

    forecast: bool
    value: Tensor | None = None
    change: Tensor | None = None

    def store(self, new: Tensor) -> None:
        known = self.forecast and self.value is not None
        self.change = new - self.value if known else torch.zeros_like(new)
        self.value = new.clone()

    def at(self, reach: float) -> Tensor:
        return self.value + self.change * reach

    def put(self, where: tuple[int, ...], fresh: Tensor, reach: float) -> None:
        self.value[where] = fresh - self.change[where] * reach


@dataclass
class Branches(Cached):
    """The branches of one MoE layer by slot: expert, weight, output, its norm, and the step it is from."""

    ids: Tensor | None = None
    weights: Tensor | None = None
    norms: Tensor | None = None
    made: Tensor | None = None

    def store_slots(self, ids: Tensor, weights: Tensor, outputs: Tensor, step: int) -> None:
        change = torch.zeros_like(outputs)
        if self.forecast and self.value is not None:
            for place in places(ids):
                for slot, held in enumerate(self.ids[place[:2]].tolist()):
                    if held == int(ids[place]):
                        change[place] = outputs[place] - self.value[(*place[:2], slot)]
        self.value, self.change = outputs.clone(), change
        self.ids, self.weights, self.norms = ids.clone(), weights.clone(), outputs.norm(dim=-1)
        self.made = torch.full_like(ids, step)

    def overwrite(
        self, slot: tuple[int, ...], expert: int, weight: Tensor, fresh: Tensor, reach: float, step: int
    ) -> None:
        if int(self.ids[slot]) != expert:
            self.change[slot] = 0
        self.put(slot, fresh, reach)
        self.ids[slot], self.weights[slot] = expert, weight
        self.norms[slot], self.made[slot] = fresh.norm(), step

    def contributions(self) -> Tensor:
        return (self.norms / self.norms.sum(-1, keepdim=True)).nan_to_num()


def places(values: Tensor) -> list[tuple[int, ...]]:
    return [tuple(place) for place in torch.ones_like(values, dtype=torch.bool).nonzero().tolist()]


class State:
    """What one block keeps between steps."""

    def __init__(self, forecast: tuple[str, ...]) -> None:
        self.attention = Cached("attention" in forecast)
        self.dense = Cached("experts" in forecast)
        self.shared = Cached("shared" in forecast)
        self.branches = Branches("experts" in forecast)
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.statistic: Tensor | float = 0.0
        self.pool = Pool("experts" in forecast)


@dataclass(frozen=True)
class Simulated:
    """One step: its output, its decisions by block, and whether one of them was too close to call."""

    full: bool
    output: Tensor
    decisions: dict[int, Decision] = field(default_factory=dict)
    close: bool = False


def with_noise(seen: Tensor, edge: float) -> list[Tensor]:
    """What a router reads, twice with a little noise."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(seen.shape, generator=generator).to(seen.dtype) for _ in range(2)]
    return [seen + 0.1 * edge * seen.abs().max() * each for each in noise]


class Simulation:
    """A generation: call `step` once a sampling step. `capacity`: tokens that a cache step may recompute."""

    def __init__(self, model: Model, understood: Understood, config: MoecaConfig) -> None:
        self.model, self.understood, self.config = model, understood, config
        self.capacity = model.how.tokens
        self.states = [State(config.forecast) for _ in model.blocks]
        self.number, self.full_at = 0, []
        self.close, self.edge = False, EDGES[model.how.dtype]

    @torch.no_grad()
    def step(self, x: Tensor, t: Tensor, *inputs: Tensor | None) -> Simulated:
        h, context = self.model.start(x, t, *inputs)
        self.time, first, text = float(t.flatten()[0]), h, context.text
        self.decisions: dict[int, Decision] = {}
        self.chosen: Tensor | None = None  # (B, N): of the nearest MoE layer before
        full = self.is_full()
        for number, block in enumerate(self.model.blocks):
            context = replace(context, text=text)
            parts = block.modulations(context)
            h = self.model.skipped(h, first, number)
            h = (self.full_block if full else self.cached_block)(number, block, h, context, parts)
            text = block.next_text(text, parts)
        if full:
            self.full_at = [*self.full_at[-1:], self.time]
        self.number += 1
        return Simulated(full, self.model.finish(h, context), self.decisions, self.close)

    def is_full(self) -> bool:
        if self.config.full_steps is not None:
            return self.number in self.config.full_steps
        return self.number % self.config.full_every == 0

    @property
    def reach(self) -> float:
        if len(self.full_at) < 2:
            return 0.0
        return (self.time - self.full_at[1]) / (self.full_at[1] - self.full_at[0])

    # Full steps

    def full_block(
        self, number: int, block: Block, h: Tensor, context: Context, parts: tuple[Modulation, ...]
    ) -> Tensor:
        state = self.states[number]
        q, keys, values = self.heads(block, h, context, parts)
        attention = block.attn.projected(block.attn.attend(q, keys, values, context.keep))
        state.attention.store(attention)
        state.keys, state.values = keys.clone(), values.clone()
        h = block.after_attention(block.join(h, attention, parts[0]))
        x = block.mlp_input(h, parts)
        if not isinstance(block.mlp, Layer):
            out = block.mlp(x)
            state.dense.store(out)
            return block.join(h, out, parts[1])
        return block.join(
            h,
            self.full_experts(state, block.mlp, x, block.seen(h, context, parts), block.extra(x, context)),
            parts[1],
        )

    def full_experts(self, state: State, layer: Layer, x: Tensor, seen: Tensor, extra: Tensor | None) -> Tensor:
        """Routed and shared experts."""
        shared = layer.shared_output(x)
        if shared is not None:
            state.shared.store(shared)
        if isinstance(layer, PairLayer):
            self.note_close_pairs(layer, x, seen)
            out = full_pairs(layer, state.pool, x, seen, self.config, self.number)
        else:
            out = self.full_branches(state, layer, x, seen, extra)
        return out if shared is None else out + shared

    def full_branches(self, state: State, layer: Layer, x: Tensor, seen: Tensor, extra: Tensor | None) -> Tensor:
        ids, weights = self.route(layer, seen)
        outputs = torch.stack([self.branch(layer, int(ids[place]), x, extra, place) for place in places(ids)])
        outputs = outputs.view(*ids.shape, -1)
        state.branches.store_slots(ids, score_weights(weights, self.config), outputs, self.number)
        state.statistic = update_statistic(state.statistic, ids, layer.num_experts, self.config)
        return (weights.unsqueeze(-1) * outputs).sum(-2)

    def heads(
        self, block: Block, h: Tensor, context: Context, parts: tuple[Modulation, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        text = block.text_of(context, parts)
        return block.attn.heads(block.attention_input(h, parts), context.rope, text)

    def branch(self, layer: Layer, expert: int, x: Tensor, extra: Tensor | None, place: tuple[int, ...]) -> Tensor:
        """One expert on one token, a row by itself."""
        token = place[:2]
        return layer.expert(expert, x[token][None], x[token][None] if extra is None else extra[token][None])[0]

    def route(self, layer: Layer, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The router's choice; notes where a little noise would change it."""
        ids, weights = layer.route(seen)
        for noisy in with_noise(seen, self.edge):
            self.close |= not torch.equal(layer.route(noisy)[0].sort(-1)[0], ids.sort(-1)[0])
        return ids, weights

    def note_close_pairs(self, layer: PairLayer, x: Tensor, seen: Tensor) -> None:
        routed = layer.pairs(x, seen)[0]
        noisy = zip(with_noise(x, self.edge), with_noise(seen, self.edge), strict=True)
        self.close |= any(not torch.equal(layer.pairs(*each)[0], routed) for each in noisy)

    # Cache steps

    def cached_block(
        self, number: int, block: Block, h: Tensor, context: Context, parts: tuple[Modulation, ...]
    ) -> Tensor:
        state, layer = self.states[number], block.mlp if isinstance(block.mlp, Layer) else None
        if self.understood.attention[number]:
            probing = self.config.mask_source == "probe" or self.chosen is None
            if layer is not None and probing:
                probed = block.after_attention(block.join(h, state.attention.at(self.reach), parts[0]))
                self.decide(number, layer, block.mlp_input(probed, parts), block.seen(probed, context, parts))
            self.refresh_attention(block, state, h, context, parts)
            attention = state.attention.at(self.reach)
        else:
            q, keys, values = self.heads(block, h, context, parts)
            attention = block.attn.projected(block.attn.attend(q, keys, values, context.keep))
        h = block.after_attention(block.join(h, attention, parts[0]))
        x = block.mlp_input(h, parts)
        if not self.understood.feedforward[number]:
            out = block.called(x, block.seen(h, context, parts), context)
        elif layer is None:
            out = self.dense(block, state, x)
        else:
            seen = block.seen(h, context, parts)
            if number not in self.decisions:
                self.decide(number, layer, x, seen)
            out = self.experts(number, layer, x, seen, block.extra(x, context))
        return block.join(h, out, parts[1])

    def refresh_attention(
        self, block: Block, state: State, h: Tensor, context: Context, parts: tuple[Modulation, ...]
    ) -> None:
        if self.chosen is None:
            return
        q, k, v = self.heads(block, h, context, parts)
        if self.config.keys_values == "all":
            state.keys, state.values = k, v
        fresh = self.chosen if self.config.keys_values == "chosen" else torch.zeros_like(self.chosen)
        for b, n in fresh.nonzero().tolist():  # the text's, which stand behind, are kept from the last full step
            state.keys[b, :, n], state.values[b, :, n] = k[b, :, n], v[b, :, n]
        attention = block.attn.projected(block.attn.attend(q, state.keys, state.values, context.keep))
        for b, n in self.chosen.nonzero().tolist():
            state.attention.put((b, n), attention[b, n], self.reach)

    def dense(self, block: Block, state: State, x: Tensor) -> Tensor:
        if self.chosen is not None:
            for b, n in self.chosen.nonzero().tolist():
                state.dense.put((b, n), block.mlp(x[b, n][None])[0], self.reach)
        return state.dense.at(self.reach)

    def decide(self, number: int, layer: Layer, x: Tensor, seen: Tensor) -> None:
        if isinstance(layer, PairLayer):
            self.note_close_pairs(layer, x, seen)
            pool, config = self.states[number].pool, self.config
            decision, close = decide_pairs(layer, pool, x, seen, config, self.number, self.capacity, self.edge)
            self.decisions[number], self.chosen = decision, decision.recomputed.any(-1)
            self.close |= close
            return
        ids, weights = self.route(layer, seen)
        state, config = self.states[number], self.config
        cache = state.branches
        state.statistic = update_statistic(state.statistic, ids, layer.num_experts, config)
        slots, matched = match(ids, cache.ids)
        current, ages = score_weights(weights, config), self.number - cache.made
        scores = branch_scores(current, cache.weights, cache.contributions(), ages, slots, config)
        thresholds = expert_thresholds(state.statistic, config).expand(len(ids), -1)
        if config.budget is None:
            wanted = over_threshold(scores, ids, matched, thresholds)
            limits = thresholds.unsqueeze(1).expand(-1, ids.shape[1], -1).gather(-1, ids)
            self.close |= bool((matched & ((scores - limits).abs() < self.edge)).any())
        else:
            wanted = within_budget(scores, matched, config.budget)
            self.close |= ranks_are_close(scores, matched, wanted, self.edge)
        recomputed, cut = first_tokens(wanted, scores, matched, self.capacity, self.edge)
        self.close |= cut
        self.decisions[number] = Decision(ids, weights, slots, recomputed, matched, scores, thresholds, wanted)
        self.chosen = recomputed.any(-1)

    def rerouted(self, number: int, layer: Layer, seen: Tensor) -> Decision:
        """The decision with the chosen tokens routed on their refreshed input."""
        decision = self.decisions[number]
        chosen = decision.recomputed.any(-1, keepdim=True)
        ids, weights = self.route(layer, seen)
        slots, matched = match(ids, self.states[number].branches.ids)
        recomputed = ~matched | decision.recomputed_slots().gather(-1, slots)
        return replace(
            decision,
            ids=torch.where(chosen, ids, decision.ids),
            weights=torch.where(chosen, weights, decision.weights),
            slots=torch.where(chosen, slots, decision.slots),
            recomputed=torch.where(chosen, recomputed, decision.recomputed),
        )

    def experts(self, number: int, layer: Layer, x: Tensor, seen: Tensor, extra: Tensor | None) -> Tensor:
        """Equation 8, and the shared experts."""
        state = self.states[number]
        if isinstance(layer, PairLayer):
            self.note_close_pairs(layer, x, seen)
            at = (self.reach, self.number)
            routed = cached_pairs(layer, state.pool, x, seen, self.decisions[number], self.config, at)
        else:
            routed = self.branches(number, layer, x, seen, extra)
        shared = self.shared(layer, state, x)
        return routed if shared is None else routed + shared

    def branches(self, number: int, layer: Layer, x: Tensor, seen: Tensor, extra: Tensor | None) -> Tensor:
        decision = self.decisions[number] = self.rerouted(number, layer, seen)
        state, weights = self.states[number], score_weights(decision.weights, self.config)
        used, routed = state.branches.at(self.reach), torch.zeros_like(x)
        for place in places(decision.ids):
            slot, expert = (*place[:2], int(decision.slots[place])), int(decision.ids[place])
            output = used[slot]
            if decision.recomputed[place]:
                output = self.branch(layer, expert, x, extra, place)
                if self.config.overwrite:
                    state.branches.overwrite(slot, expert, weights[place], output, self.reach, self.number)
            routed[place[:2]] += decision.weights[place] * output
        return routed

    def shared(self, layer: Layer, state: State, x: Tensor) -> Tensor | None:
        if not layer.shared_experts:
            return None
        if self.config.shared == "always":
            return layer.shared_output(x)
        if self.config.shared == "any":
            for b, n in self.chosen.nonzero().tolist():
                state.shared.put((b, n), layer.shared_output(x[b, n][None])[0], self.reach)
        return state.shared.at(self.reach)
