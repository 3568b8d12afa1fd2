"""The method where tokens have no fixed number of experts, for any layer of pairs.py; see simulation.py.

What differs: a branch is any routed (token, expert) pair, found in the cache by that pair; routing is taken anew
for all tokens on the refreshed input; a pair that is not in the cache is computed whether its token was chosen or
not; the cache has a fixed number of rows, and a new pair takes the first one whose pair is no longer routed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeca_compile.config import MoecaConfig
from tests.policies.reference_moeca import Decision, expert_thresholds
from tests.variants.pairs import PairLayer
from tests.variants.ranking import first_tokens, ranks_are_close

Pair = tuple[int, int, int]  # sample, token, expert


@dataclass
class Skipped:
    """What is kept of one pair: its output and how that changed between full steps, weight, norm, step."""

    value: Tensor
    change: Tensor
    weight: Tensor
    norm: Tensor
    step: int


@dataclass
class Pool:
    """The cache of one layer: which pair each row belongs to, and what is kept of it."""

    forecast: bool
    rows: list[Pair | None] = field(default_factory=list)
    held: dict[Pair, Skipped] = field(default_factory=dict)
    statistic: Tensor | float = 0.0


def pairs_of(mask: Tensor) -> list[Pair]:
    """The true entries of (B, N, E), in order."""
    return [tuple(pair) for pair in mask.nonzero().tolist()]


def full_pairs(layer: PairLayer, pool: Pool, x: Tensor, seen: Tensor, config: MoecaConfig, step: int) -> Tensor:
    """The layer as it is, without shared experts; the pool is filled."""
    routed, weights = layer.pairs(x, seen)
    out, score, old, new = torch.zeros_like(x), for_score(routed, weights, config), pool.held, {}
    for pair in pairs_of(routed):
        value = one_output(layer, x, pair)
        out[pair[:2]] += weights[pair] * value
        change = value - old[pair].value if pool.forecast and pair in old else torch.zeros_like(value)
        new[pair] = Skipped(value, change, score[pair], value.norm(), step)
    slots = layer.branches(*x.shape[:2]) or round(config.branches_per_token * x.shape[0] * x.shape[1])
    pool.rows = [*new, *[None] * slots][:slots]
    pool.held = {pair: new[pair] for pair in pool.rows if pair is not None}
    count_activation(pool, routed, config)
    return out


def one_output(layer: PairLayer, x: Tensor, pair: Pair) -> Tensor:
    return layer.experts[pair[2]](x[pair[:2]][None])[0]


def count_activation(pool: Pool, routed: Tensor, config: MoecaConfig) -> None:
    now = routed.transpose(1, 2).float()
    now = now.mean(0, keepdim=True) if config.statistic == "batch" else now
    pool.statistic = config.beta * pool.statistic + (1 - config.beta) * now


def for_score(routed: Tensor, weights: Tensor, config: MoecaConfig) -> Tensor:
    weights = torch.where(routed, weights, 0)
    if config.score_weights == "raw":
        return weights
    return (weights / weights.sum(-1, keepdim=True)).nan_to_num()


def pair_scores(pool: Pool, routed: Tensor, weights: Tensor, config: MoecaConfig, step: int) -> tuple[Tensor, Tensor]:
    """Equation 9 and whether a pair is cached, both (B, N, E), of routed pairs."""
    matched, norms = torch.zeros_like(routed), torch.zeros_like(weights)
    for pair, kept in pool.held.items():
        matched[pair], norms[pair] = routed[pair], kept.norm
    contributions = (norms / norms.sum(-1, keepdim=True)).nan_to_num()
    scores = torch.zeros_like(weights)
    for pair in pairs_of(routed):
        kept = pool.held.get(pair)
        drift = abs(weights[pair] - (kept.weight if kept else 0))
        scores[pair] = drift
        if config.score != "drift":
            scores[pair] = weights[pair] + config.lambda1 * drift + config.lambda2 * contributions[pair]
        if config.score == "staleness":
            scores[pair] += 0.25 * (step - kept.step if kept else 0) / config.full_every
    return scores, matched


def decide_pairs(
    layer: PairLayer, pool: Pool, x: Tensor, seen: Tensor, config: MoecaConfig, step: int, capacity: int, edge: float
) -> tuple[Decision, bool]:
    """What to recompute, and whether that was too close to call."""
    routed, raw = layer.pairs(x, seen)
    count_activation(pool, routed, config)
    limits = expert_thresholds(pool.statistic, config).expand(len(seen), -1)[:, None]
    weights = for_score(routed, raw, config)
    scores, matched = pair_scores(pool, routed, weights, config, step)
    if config.budget is None:
        wanted = routed & (~matched | (scores > limits))
        close = bool((matched & ((scores - limits).abs() < edge)).any())
    else:
        wanted = best_pairs(routed, scores, matched, config.budget)
        close = ranks_are_close(scores, matched, wanted, edge, routed)
    recomputed, cut = first_tokens(wanted, scores, matched, capacity, edge)
    return Decision(routed, weights, routed, recomputed, matched, scores, limits, wanted), close or cut


def best_pairs(routed: Tensor, scores: Tensor, matched: Tensor, budget: float) -> Tensor:
    wanted = torch.zeros_like(routed)
    for b in range(len(routed)):
        order = [pair[1:] for pair in pairs_of(routed[b : b + 1])]
        order.sort(key=lambda place: (bool(matched[b][place]), -float(scores[b][place]), place))
        for place in order[: round(budget * len(order))]:
            wanted[b][place] = True
    return wanted


def cached_pairs(
    layer: PairLayer,
    pool: Pool,
    x: Tensor,
    seen: Tensor,
    decision: Decision,
    config: MoecaConfig,
    at: tuple[float, int],
) -> Tensor:
    """The layer's output on a cache step, without shared experts; `at` is the forecast's reach and the step."""
    (reach, step), out = at, torch.zeros_like(x)
    routed, weights = layer.pairs(x, seen)
    score = for_score(routed, weights, config)
    todo = [pair for pair in pairs_of(routed) if pair not in pool.held or bool(decision.recomputed[pair])]
    fresh = {pair: one_output(layer, x, pair) for pair in todo}
    for pair in pairs_of(routed):
        value = fresh.get(pair)
        out[pair[:2]] += weights[pair] * (
            value if value is not None else pool.held[pair].value + pool.held[pair].change * reach
        )
    if config.overwrite:
        keep(pool, routed, fresh, score, reach, step)
    return out


def keep(pool: Pool, routed: Tensor, fresh: dict[Pair, Tensor], score: Tensor, reach: float, step: int) -> None:
    free = [row for row, pair in enumerate(pool.rows) if pair is None or not routed[pair]]
    for pair in [pair for pair in fresh if pair not in pool.held][: len(free)]:
        row = free.pop(0)
        old = pool.rows[row]
        if old is not None:
            del pool.held[old]
        pool.rows[row], zero = pair, torch.zeros_like(fresh[pair])
        pool.held[pair] = Skipped(zero, zero.clone(), score[pair], zero.norm(), step)
    for pair, value in fresh.items():
        if pair in pool.held:
            kept = pool.held[pair]
            kept.value, kept.norm = value - kept.change * reach, value.norm()
            kept.weight, kept.step = score[pair], step
