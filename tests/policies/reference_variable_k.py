"""The method where tokens have no fixed number of experts, as loops over pairs; see reference_moeca.py.

What differs: a branch is any routed (token, expert) pair, found in the cache by that pair; routing is taken anew
for all tokens on the refreshed input; a pair that is not in the cache is computed whether its token was chosen or
not; the cache has a fixed number of rows, and a new pair takes the first one whose pair is no longer routed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from examples.dit import Block
from moeca_compile.config import MoecaConfig
from tests.policies.reference_moeca import TINY, BlockState, Decision, Simulation, expert_thresholds
from tests.policies.variable_k_models import PairsMoE

Pair = tuple[int, int, int]  # sample, token, expert


@dataclass
class Branch:
    """What is kept of one pair."""

    value: Tensor
    slope: Tensor
    weight: Tensor
    norm: Tensor
    step: int


@dataclass
class Pairs:
    """The cache of one layer: which pair each row belongs to, and what is kept of it."""

    rows: list[Pair | None] = field(default_factory=list)
    held: dict[Pair, Branch] = field(default_factory=dict)


def pairs_of(mask: Tensor) -> list[Pair]:
    """The true entries of (B, N, E), in order."""
    return [tuple(pair) for pair in mask.nonzero().tolist()]


class PairSimulation(Simulation):
    moe = PairsMoE

    def __init__(self, model: torch.nn.Module, config: MoecaConfig) -> None:
        super().__init__(model, config, reroute=True)
        self.pairs = {id(state): Pairs() for state in self.states}

    def _full_feed_forward(self, block: Block, state: BlockState, z: Tensor, gap: int) -> Tensor:
        if not isinstance(block.mlp, PairsMoE):
            return super()._full_feed_forward(block, state, z, gap)
        routed, weights = block.mlp.router(z)
        cache, out = self.pairs[id(state)], torch.zeros_like(z)
        score, old, cache.held = self._for_score(routed, weights), cache.held, {}
        for pair in pairs_of(routed):
            value = block.mlp.experts[pair[2]](z[pair[:2]])
            out[pair[:2]] += weights[pair] * value
            known = "experts" in self.config.forecast and pair in old
            slope = (value - old[pair].value) / gap if known else torch.zeros_like(value)
            cache.held[pair] = Branch(value, slope, score[pair], value.norm(), self.next_step)
        slots = block.mlp.router.branches(z) or round(self.config.branches_per_token * z.shape[0] * z.shape[1])
        cache.rows = [*cache.held, *[None] * slots][:slots]
        cache.held = {pair: cache.held[pair] for pair in cache.rows if pair is not None}
        state.shared.store(block.mlp.shared_expert(z), gap)
        self._count_activation(state, routed)
        return out + state.shared.value

    def _count_activation(self, state: BlockState, routed: Tensor) -> None:
        now = routed.transpose(1, 2).float()
        now = now.mean(0, keepdim=True) if self.config.statistic == "batch" else now
        state.statistic = self.config.beta * state.statistic + (1 - self.config.beta) * now

    def _for_score(self, routed: Tensor, weights: Tensor) -> Tensor:
        weights = torch.where(routed, weights, 0)
        if self.config.score_weights == "raw":
            return weights
        return weights / weights.sum(-1, keepdim=True).clamp_min(TINY)

    def _decide(self, block: Block, state: BlockState, probe: Tensor) -> Decision:
        routed, weights = block.mlp.router(probe)
        held, config = self.pairs[id(state)].held, self.config
        self._count_activation(state, routed)
        thresholds = expert_thresholds(state.statistic, config).expand(len(probe), -1)
        weights, scores = self._for_score(routed, weights), torch.zeros(routed.shape)
        matched = torch.zeros_like(routed)
        norms = torch.zeros(routed.shape)
        for pair, branch in held.items():
            matched[pair], norms[pair] = routed[pair], branch.norm
        contributions = norms / norms.sum(-1, keepdim=True).clamp_min(TINY)
        for pair in pairs_of(routed):
            drift = abs(weights[pair] - (held[pair].weight if pair in held else 0))
            scores[pair] = weights[pair] + config.lambda1 * drift + config.lambda2 * contributions[pair]
            if config.score == "drift":
                scores[pair] = drift
            if config.score == "staleness":
                age = self.next_step - held[pair].step if pair in held else 0
                scores[pair] += 0.25 * age / config.full_every
        wanted = routed & (~matched | (scores > thresholds[:, None]))
        if config.budget is not None:
            wanted = torch.zeros_like(routed)
            for b in range(len(routed)):
                places = pairs_of(routed[b : b + 1])
                places.sort(key=lambda p: (bool(matched[b][p[1:]]), -float(scores[b][p[1:]]), p))
                for place in places[: round(config.budget * len(places))]:
                    wanted[b][place[1:]] = True
        recomputed = self._within_capacity(wanted, scores, matched)
        return Decision(routed, weights, routed, recomputed, matched, scores, thresholds, wanted)

    def _within_capacity(self, wanted: Tensor, scores: Tensor, matched: Tensor) -> Tensor:
        recomputed = torch.zeros_like(wanted)
        for b in range(len(wanted)):

            def rank(n: int, b: int = b) -> tuple[bool, float, int]:
                mine = wanted[b, n]
                return not bool((mine & ~matched[b, n]).any()), -float(scores[b, n][mine].max()), n

            tokens = sorted(wanted[b].any(-1).nonzero().flatten().tolist(), key=rank)
            for n in tokens[: self.capacity]:
                recomputed[b, n] = wanted[b, n]
        return recomputed

    def _rerouted(self, moe: PairsMoE, state: BlockState, z: Tensor, decision: Decision) -> Decision:
        """The routing of the refreshed input; `matched` and `recomputed` are those of the routed pairs, in order."""
        routed, weights = moe.router(z)
        held = self.pairs[id(state)].held
        matched = torch.tensor([pair in held for pair in pairs_of(routed)])
        recomputed = ~matched | decision.recomputed[routed]
        self.chosen = decision.recomputed.any(-1)
        return Decision(routed, weights, routed, recomputed, matched, decision.scores, decision.thresholds, routed)

    def _moe(self, moe: PairsMoE, state: BlockState, z: Tensor, decision: Decision) -> Tensor:
        cache, out = self.pairs[id(state)], torch.zeros_like(z)
        routed, config = decision.ids, self.config
        score = self._for_score(routed, decision.weights)
        todo = [p for p, new in zip(pairs_of(routed), decision.recomputed.tolist(), strict=True) if new]
        fresh = {pair: moe.experts[pair[2]](z[pair[:2]]) for pair in todo}
        for pair in pairs_of(routed):
            value = fresh.get(pair)
            if value is None:
                value = cache.held[pair].value + cache.held[pair].slope * self._d
            out[pair[:2]] += decision.weights[pair] * value
        if config.overwrite:
            self._keep(cache, routed, fresh, score)
        return out + self._shared(moe, state, z, self.chosen)

    def _keep(self, cache: Pairs, routed: Tensor, fresh: dict[Pair, Tensor], score: Tensor) -> None:
        free = [row for row, pair in enumerate(cache.rows) if pair is None or not routed[pair]]
        for pair in [pair for pair in fresh if pair not in cache.held]:
            if not free:
                continue
            row = free.pop(0)
            cache.held.pop(cache.rows[row], None)
            cache.rows[row] = pair
            cache.held[pair] = Branch(fresh[pair], torch.zeros_like(fresh[pair]), score[pair], fresh[pair].norm(), 0)
        for pair, value in fresh.items():
            if pair in cache.held:
                branch = cache.held[pair]
                branch.value, branch.norm = value - branch.slope * self._d, value.norm()
                branch.weight, branch.step = score[pair], self.next_step
