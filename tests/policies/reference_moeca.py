"""MoECa as plain loops over blocks, tokens and branches: what the compiled policy is tested against.

Written from the paper (section 4, equations 7 to 12) and the options of MoecaConfig, without the compiler. It
simulates `tests.models.TinyDiTMoE` over whole generations. Where the paper is silent, this file decides:

- The decision and the routing of a cache step are taken once, on the probe: the router on the block's input
  plus the gated *cached* attention. Recomputed branches then run on the refreshed input. With `reroute`,
  chosen tokens are routed again on it, and slots that get another expert by that are recomputed as well.
- With mask_source "previous" there is no probe but in the first MoE layer: attention is refreshed for the
  chosen tokens of the MoE layer before, then the router runs and decides.
- Blocks without MoE follow the chosen tokens of the nearest MoE layer before them; blocks before the first
  MoE layer reuse all.
- A branch whose expert is in the token's cache has that slot; the others take the free slots in order.
- An unmatched branch is scored against the slot that it takes; its score only serves to rank it.
- The contribution of a slot comes from the norm of its output when that was last computed.
- A token past the capacity reuses all its slots, with the current weights.
- A forecast tensor is the polynomial through its values at the last full steps. A refreshed entry keeps their
  differences, and its values are set so that the forecast is the fresh output. A slot that another expert takes
  loses its history.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from examples.dit import Attention, Block, modulate
from moeca_compile.config import MoecaConfig
from tests.models import MoE, TinyDiTMoE

TINY = 1e-20  # keeps quotients of all-zero rows at zero


@dataclass(frozen=True)
class Decision:
    """What one MoE layer decided on a cache step; all but `thresholds` are (B, N, k) by current branch.

    After rerouting, the first four are by rerouted branch in the rows of the chosen tokens; the rest is the
    probe's.
    """

    ids: Tensor  # experts
    weights: Tensor  # the model's own
    slots: Tensor  # place of each branch in the token's cache
    recomputed: Tensor  # bool: `wanted` within the capacity
    matched: Tensor  # bool: the expert is in the token's cache
    scores: Tensor  # equation 9
    thresholds: Tensor  # (B, E), equation 12
    wanted: Tensor  # bool: to be recomputed, by threshold or budget

    def recomputed_slots(self) -> Tensor:
        """`recomputed` by slot instead of by branch, (B, N, k)."""
        return torch.zeros_like(self.recomputed).scatter(-1, self.slots, self.recomputed)


@dataclass(frozen=True)
class StepResult:
    """One call of the model: its step kind, its output, and the decisions by index of the MoE block."""

    kind: str
    output: Tensor
    decisions: dict[int, Decision] = field(default_factory=dict)

    @property
    def match_ratio(self) -> float | None:
        """Branches found in the cache, of all branches of this step; None on a full step."""
        return _mean([decision.matched for decision in self.decisions.values()])

    @property
    def reuse_ratio(self) -> float | None:
        """Branches whose cached output was used, of all branches of this step; None on a full step."""
        return _mean([~decision.recomputed for decision in self.decisions.values()])

    @property
    def recomputed_branches(self) -> int:
        return sum(int(decision.recomputed.sum()) for decision in self.decisions.values())


def _mean(masks: list[Tensor]) -> float | None:
    return torch.cat([mask.flatten() for mask in masks]).float().mean().item() if masks else None


class Cached:
    """A cached tensor: its value at the last full step, and how it differed from that at the full steps before.

    `forecast` is the order of the polynomial through these that a read gives; 0 holds the value. Each entry has a
    history: how many full steps computed it.
    """

    def __init__(self, forecast: int) -> None:
        self.order = int(forecast)
        self.value: Tensor | None = None
        self.past: list[tuple[int, Tensor]] = []  # (steps before the last full one, change back to then)
        self.history: Tensor = torch.ones(())

    def store(self, new: Tensor, gap: int) -> None:
        if self.value is not None:
            before = [(0, torch.zeros_like(new)), *self.past]
            self.past = [(ago + gap, self.value + change - new) for ago, change in before][: self.order]
        self.value, self.history = new.clone(), torch.tensor(1 + len(self.past))

    def at(self, d: int) -> Tensor:
        return self.value + self._ahead(d)

    def _ahead(self, d: int) -> Tensor:
        """The change foreseen over d steps: Lagrange's polynomial through as many values as each entry has."""
        total = torch.zeros_like(self.value)
        for known in range(2, self.order + 2):
            nodes = [0, *(-ago for ago, _ in self.past)][:known]
            for node, (_, change) in zip(nodes[1:], self.past, strict=False):
                weight = math.prod((d - other) / (node - other) for other in nodes if other != node)
                total = total + weight * change * (self.history == known)[(...,) + (None,) * self._inner]
        return total

    @property
    def _inner(self) -> int:
        return self.value.ndim - self.history.ndim

    def put(self, where: tuple[int, ...], fresh: Tensor, d: int) -> None:
        self.value[where] = fresh - self._ahead(d)[where]


class Branches(Cached):
    """The branch cache of one MoE layer, equation 7: each slot's expert, weight, output and norm."""

    def store_slots(self, ids: Tensor, weights: Tensor, outputs: Tensor, step: int, gap: int) -> None:
        """A full step: slot p holds branch p. Its history begins anew unless its expert held a slot before."""
        history = torch.ones_like(ids)
        changes = [torch.zeros_like(outputs) for _ in range(self.order)]
        agos = [gap, *(gap + ago for ago, _ in self.past)][: self.order]
        if self.value is not None and self.order:
            for b, n, p in _indices(ids):
                for q in range(ids.shape[-1]):
                    if self.ids[b, n, q] == ids[b, n, p]:
                        old = self.value[b, n, q]
                        values = [old, *(old + change[b, n, q] for _, change in self.past)]
                        for change, value in zip(changes, values, strict=False):
                            change[b, n, p] = value - outputs[b, n, p]
                        history[b, n, p] = min(int(self.history[b, n, q]) + 1, self.order + 1)
            self.past = list(zip(agos, changes, strict=False))
        self.value, self.history = outputs.clone(), history
        self.ids, self.weights = ids.clone(), weights.clone()
        self.norms = outputs.norm(dim=-1)
        self.computed_at = torch.full_like(ids, step)

    def overwrite(
        self, slot: tuple[int, int, int], expert: int, weight: Tensor, fresh: Tensor, d: int, step: int
    ) -> None:
        if self.ids[slot] != expert:
            self.history[slot] = 1  # how another expert's output changed says nothing of this one's
        self.put(slot, fresh, d)
        self.ids[slot], self.weights[slot] = expert, weight
        self.norms[slot], self.computed_at[slot] = fresh.norm(), step

    def contributions(self) -> Tensor:
        """o of equation 9, (B, N, k) by slot."""
        return self.norms / self.norms.sum(-1, keepdim=True).clamp_min(TINY)


def _indices(tensor: Tensor) -> list[tuple[int, ...]]:
    return [tuple(index) for index in torch.ones_like(tensor, dtype=torch.bool).nonzero().tolist()]


class BlockState:
    """All that one block keeps between steps."""

    def __init__(self, forecast: tuple[str, ...], order: int = 1) -> None:
        self.attention = Cached(order * ("attention" in forecast))  # (B, N, D), before the gate
        self.keys: Tensor | None = None  # (B, H, N, D/H), as SDPA gets them
        self.values: Tensor | None = None
        self.dense = Cached(order * ("experts" in forecast))  # (B, N, D), before the gate
        self.branches = Branches(order * ("experts" in forecast))
        self.shared = Cached(order * ("shared" in forecast))  # (B, N, D)
        self.statistic: Tensor | float = 0.0  # (B, E, N), equation 10


class Simulation:
    """A generation of `model` under `config`: call `step` once a sampling step.

    capacity: most tokens that a sample may recompute in one MoE layer on a cache step; None is all.
    reroute: route chosen tokens again on their refreshed input.
    """

    moe: type[nn.Module] = MoE

    def __init__(
        self, model: TinyDiTMoE, config: MoecaConfig, capacity: int | None = None, reroute: bool = False
    ) -> None:
        if not config.recipe.startswith("moeca") or config.attention_every or config.experts_every:
            raise ValueError("the simulation has the moeca recipes with one common interval only")
        self.model, self.config, self.reroute = model, config, reroute
        self.capacity = model.sizes.tokens if capacity is None else capacity
        self.states = [BlockState(config.forecast, config.forecast_order) for _ in model.blocks]
        self.next_step, self.last_full = 0, 0

    @torch.no_grad()
    def step(self, x: Tensor, t: Tensor, y: Tensor) -> StepResult:
        """x (B, C, H, W), t (B,), y (B,), as the model takes them."""
        h, c = self.model.embed_inputs(x, t, y)
        run = self._full_step if self._is_full(self.next_step) else self._cache_step
        result = run(h, c)
        self.next_step += 1
        return result

    def _is_full(self, step: int) -> bool:
        if self.config.full_steps is not None:
            return step in self.config.full_steps
        return step % self.config.full_every == 0

    # Full step: the model as it is, and every cache filled.

    def _full_step(self, h: Tensor, c: Tensor) -> StepResult:
        gap = self.next_step - self.last_full
        self.last_full = self.next_step
        for block, state in zip(self.model.blocks, self.states, strict=True):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)
            q, state.keys, state.values = self._qkv(block.attn, modulate(block.norm1(h), shift1, scale1))
            attention = attend(block.attn, q, state.keys, state.values)
            state.attention.store(attention, gap)
            h = h + gate1.unsqueeze(1) * attention
            z = modulate(block.norm2(h), shift2, scale2)
            h = h + gate2.unsqueeze(1) * self._full_feed_forward(block, state, z, gap)
        return StepResult("full", self.model.finish(h, c))

    def _full_feed_forward(self, block: Block, state: BlockState, z: Tensor, gap: int) -> Tensor:
        if not isinstance(block.mlp, self.moe):
            state.dense.store(block.mlp(z), gap)
            return state.dense.value
        ids, weights = block.mlp.gate(z)
        outputs = torch.stack([block.mlp.experts[int(ids[i])](z[i[:2]]) for i in _indices(ids)])
        outputs = outputs.view(*ids.shape, -1)
        state.branches.store_slots(ids, score_weights(weights, self.config), outputs, self.next_step, gap)
        state.shared.store(block.mlp.shared_expert(z), gap)
        state.statistic = update_statistic(state.statistic, ids, block.mlp.gate.weight.shape[0], self.config)
        return (weights.unsqueeze(-1) * outputs).sum(-2) + state.shared.value

    # Cache step: reuse all but the recomputed branches and their tokens.

    def _cache_step(self, h: Tensor, c: Tensor) -> StepResult:
        decisions: dict[int, Decision] = {}
        chosen = torch.zeros(h.shape[:2], dtype=torch.bool)  # (B, N): tokens of the nearest MoE layer before
        for i, (block, state) in enumerate(zip(self.model.blocks, self.states, strict=True)):
            moe = isinstance(block.mlp, self.moe)
            probing = moe and (self.config.mask_source == "probe" or not decisions)
            if probing:
                decisions[i] = self._decide(block, state, self._ffn_input(block, state, h, c))
                chosen = decisions[i].recomputed.any(-1)
            if decisions:
                self._refresh_attention(block, state, h, c, chosen)
            z = self._ffn_input(block, state, h, c)
            if moe and not probing:
                decisions[i] = self._decide(block, state, z)
                chosen = decisions[i].recomputed.any(-1)
            if moe and self.reroute:
                decisions[i] = self._rerouted(block.mlp, state, z, decisions[i])
            gate1, gate2 = block.modulation(c)[2::3]
            h = h + gate1.unsqueeze(1) * state.attention.at(self._d)
            out = self._moe(block.mlp, state, z, decisions[i]) if moe else self._dense(block, state, z, chosen)
            h = h + gate2.unsqueeze(1) * out
        return StepResult("cache", self.model.finish(h, c), decisions)

    @property
    def _d(self) -> int:
        return self.next_step - self.last_full

    def _ffn_input(self, block: Block, state: BlockState, h: Tensor, c: Tensor) -> Tensor:
        """What the feed-forward of the block reads, with the attention that the cache holds now."""
        _, _, gate1, shift2, scale2, _ = block.modulation(c)
        return modulate(block.norm2(h + gate1.unsqueeze(1) * state.attention.at(self._d)), shift2, scale2)

    def _refresh_attention(self, block: Block, state: BlockState, h: Tensor, c: Tensor, chosen: Tensor) -> None:
        """Keys and values first, as keys_values says, then the attention output of the chosen tokens."""
        shift1, scale1 = block.modulation(c)[:2]
        q, k, v = self._qkv(block.attn, modulate(block.norm1(h), shift1, scale1))
        fresh = {"all": torch.ones_like(chosen), "chosen": chosen, "none": torch.zeros_like(chosen)}
        for b, n in fresh[self.config.keys_values].nonzero().tolist():
            state.keys[b, :, n], state.values[b, :, n] = k[b, :, n], v[b, :, n]
        attention = attend(block.attn, q, state.keys, state.values)
        for b, n in chosen.nonzero().tolist():
            state.attention.put((b, n), attention[b, n], self._d)

    def _dense(self, block: Block, state: BlockState, z: Tensor, chosen: Tensor) -> Tensor:
        for b, n in chosen.nonzero().tolist():
            state.dense.put((b, n), block.mlp(z[b, n]), self._d)
        return state.dense.at(self._d)

    def _moe(self, moe: MoE, state: BlockState, z: Tensor, decision: Decision) -> Tensor:
        """Equation 8: current weights over recomputed and cached branch outputs, and the shared expert."""
        used = state.branches.at(self._d)  # (B, N, k, D) by slot
        weights = score_weights(decision.weights, self.config)
        routed = torch.zeros_like(z)
        for b, n, p in _indices(decision.ids):
            slot, expert = (b, n, int(decision.slots[b, n, p])), int(decision.ids[b, n, p])
            output = used[slot]
            if decision.recomputed[b, n, p]:
                output = moe.experts[expert](z[b, n])
                if self.config.overwrite:
                    state.branches.overwrite(slot, expert, weights[b, n, p], output, self._d, self.next_step)
            routed[b, n] += decision.weights[b, n, p] * output
        return routed + self._shared(moe, state, z, decision.recomputed.any(-1))

    def _shared(self, moe: MoE, state: BlockState, z: Tensor, chosen: Tensor) -> Tensor:
        fresh = {"any": chosen, "always": torch.ones_like(chosen), "never": torch.zeros_like(chosen)}
        for b, n in fresh[self.config.shared].nonzero().tolist():
            state.shared.put((b, n), moe.shared_expert(z[b, n]), self._d)
        return state.shared.at(self._d)

    def _decide(self, block: Block, state: BlockState, probe: Tensor) -> Decision:
        ids, weights = block.mlp.gate(probe)
        cache, config = state.branches, self.config
        state.statistic = update_statistic(state.statistic, ids, block.mlp.gate.weight.shape[0], config)
        slots, matched = match(ids, cache.ids)
        ages = self.next_step - cache.computed_at
        current = score_weights(weights, config)
        scores = branch_scores(current, cache.weights, cache.contributions(), ages, slots, config)
        thresholds = expert_thresholds(state.statistic, config).expand(ids.shape[0], -1)
        wanted = over_threshold(scores, ids, matched, thresholds)
        if config.budget is not None:
            wanted = within_budget(scores, matched, config.budget)
        recomputed = within_capacity(wanted, scores, matched, self.capacity)
        return Decision(ids, weights, slots, recomputed, matched, scores, thresholds, wanted)

    def _rerouted(self, moe: MoE, state: BlockState, z: Tensor, decision: Decision) -> Decision:
        """The decision with the chosen tokens routed on their refreshed input z."""
        chosen = decision.recomputed.any(-1, keepdim=True)
        ids, weights = moe.gate(z)
        slots, matched = match(ids, state.branches.ids)
        recomputed = ~matched | decision.recomputed_slots().gather(-1, slots)
        return replace(
            decision,
            ids=torch.where(chosen, ids, decision.ids),
            weights=torch.where(chosen, weights, decision.weights),
            slots=torch.where(chosen, slots, decision.slots),
            recomputed=torch.where(chosen, recomputed, decision.recomputed),
        )

    def _qkv(self, attn: Attention, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, N, D/H) each, as SDPA gets them."""
        q, k, v = attn.split_heads(z)
        return q, k, v.clone()


def attend(attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention and output projection, (B, N, D)."""
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    out = (weights @ v).transpose(1, 2)
    return attn.proj(out.reshape(*out.shape[:2], -1))


def score_weights(weights: Tensor, config: MoecaConfig) -> Tensor:
    """w of equation 9, (B, N, k)."""
    if config.score_weights == "raw":
        return weights
    return weights / weights.sum(-1, keepdim=True).clamp_min(TINY)


def update_statistic(old: Tensor | float, ids: Tensor, experts: int, config: MoecaConfig) -> Tensor:
    """Equation 10: (B, E, N), or (1, E, N) where one statistic serves the batch."""
    batch, tokens, _ = ids.shape
    routed = torch.zeros(batch, experts, tokens)
    for b, n, p in _indices(ids):
        routed[b, ids[b, n, p], n] = 1.0
    if config.statistic == "batch":
        routed = routed.mean(0, keepdim=True)
    return config.beta * old + (1 - config.beta) * routed


def normalized_entropy(statistic: Tensor, config: MoecaConfig) -> Tensor:
    """Equation 11, (B, E) in [0, 1]; an expert that no token was ever routed to has 0."""
    p = statistic / statistic.sum(-1, keepdim=True).clamp_min(TINY)
    entropy = torch.special.entr(p).sum(-1)
    if config.entropy == "log":
        return entropy / math.log(statistic.shape[-1])
    low, high = entropy.amin(-1, keepdim=True), entropy.amax(-1, keepdim=True)
    return (entropy - low) / (high - low).clamp_min(TINY)


def expert_thresholds(statistic: Tensor, config: MoecaConfig) -> Tensor:
    """Equation 12, (B, E)."""
    return config.tau0 * (1 + config.alpha * (2 * normalized_entropy(statistic, config) - 1))


def match(ids: Tensor, cached_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Slot of each current branch, and whether it holds the branch's expert; both (B, N, k)."""
    slots, matched = torch.full_like(ids, -1), torch.zeros_like(ids, dtype=torch.bool)
    batch, tokens, k = ids.shape
    for b in range(batch):
        for n in range(tokens):
            held = cached_ids[b, n].tolist()
            for p, expert in enumerate(ids[b, n].tolist()):
                if expert in held:
                    slots[b, n, p], matched[b, n, p] = held.index(expert), True
            free = [q for q in range(k) if q not in slots[b, n].tolist()]
            for p in range(k):
                if not matched[b, n, p]:
                    slots[b, n, p] = free.pop(0)
    return slots, matched


def branch_scores(
    weights: Tensor,
    cached_weights: Tensor,
    contributions: Tensor,
    ages: Tensor,
    slots: Tensor,
    config: MoecaConfig,
) -> Tensor:
    """Equation 9, (B, N, k) by branch; cached_weights, contributions and ages (in steps) are by slot."""
    drift = (weights - cached_weights.gather(-1, slots)).abs()
    if config.score == "drift":
        return drift
    scores = weights + config.lambda1 * drift + config.lambda2 * contributions.gather(-1, slots)
    if config.score == "staleness":
        scores = scores + 0.25 * ages.gather(-1, slots) / config.full_every
    return scores


def over_threshold(scores: Tensor, ids: Tensor, matched: Tensor, thresholds: Tensor) -> Tensor:
    """Branches to recompute, (B, N, k): unmatched, or with a score above their expert's threshold."""
    wanted = ~matched
    for b, n, p in _indices(ids):
        wanted[b, n, p] |= scores[b, n, p] > thresholds[b, ids[b, n, p]]
    return wanted


def within_budget(scores: Tensor, matched: Tensor, budget: float) -> Tensor:
    """The round(budget * N * k) highest-ranked branches of each sample, unmatched ones first, (B, N, k)."""
    wanted = torch.zeros_like(matched)
    for b in range(scores.shape[0]):
        places = _indices(scores[b])
        places.sort(key=lambda place: (bool(matched[b][place]), -float(scores[b][place]), place))
        for place in places[: round(budget * len(places))]:
            wanted[b][place] = True
    return wanted


def within_capacity(wanted: Tensor, scores: Tensor, matched: Tensor, capacity: int) -> Tensor:
    """`wanted`, for the `capacity` highest-ranked tokens of each sample only, (B, N, k)."""
    recomputed = torch.zeros_like(wanted)
    for b in range(wanted.shape[0]):
        tokens = wanted[b].any(-1).nonzero().flatten().tolist()
        tokens.sort(key=lambda n: _rank(wanted[b, n], scores[b, n], matched[b, n], n))
        for n in tokens[:capacity]:
            recomputed[b, n] = wanted[b, n]
    return recomputed


def _rank(wanted: Tensor, scores: Tensor, matched: Tensor, n: int) -> tuple[bool, float, int]:
    """First tokens with an unmatched wanted branch, then by highest wanted score, then lower index."""
    unmatched = bool((wanted & ~matched).any())
    return (not unmatched, -float(scores[wanted].max()), n)


def simulate(
    model: TinyDiTMoE,
    config: MoecaConfig,
    noise: Tensor,
    labels: Tensor,
    steps: int,
    capacity: int | None = None,
    reroute: bool = False,
) -> tuple[Tensor, list[StepResult]]:
    """`steps` Euler steps of rectified flow from t = 1 to 0: the picture, and the results by step."""
    simulation, x, results = Simulation(model, config, capacity, reroute), noise, []
    for step in range(steps):
        t = torch.full((len(x),), 1 - step / steps)
        results.append(simulation.step(x, t, labels))
        x = x - results[-1].output / steps
    return x, results
