"""MoECa's reuse decision (paper, section 4): which branches are recomputed, and on which tokens.

Shapes: B samples, N tokens, E experts, C chosen tokens, k slots a token.

With fixed k, all tensors are in *slot order*: slot q of a token holds one cached branch, and each current branch is
assigned to one slot. A matched branch gets the slot of its expert; unmatched branches get the free slots in order.
With variable k, a token has one slot for every expert (k = E), and `routed` says which of them are branches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_compile.options import Options

_UNMATCHED_FIRST = 100.0
"""Added to the rank of unmatched branches. It exceeds every score, and sums with it still order scores in float32."""


@dataclass(frozen=True)
class Routing:
    """Current branches by slot, each (B, N, k): expert ids, the model's weights, and whether the branch is cached."""

    index: Tensor
    weight: Tensor
    matched: Tensor


@dataclass(frozen=True)
class Decision:
    """What a cache step recomputes in one layer.

    Attributes:
        recompute: (B, N, k) bool by slot, before the capacity limits the tokens.
        chosen: (B, C) tokens, highest rank first.
        valid: (B, C) bool; entries that are false are padding, and their token is not recomputed.
    """

    recompute: Tensor
    chosen: Tensor
    valid: Tensor


def match(index: Tensor, weight: Tensor, cached_index: Tensor) -> Routing:
    """Match current branches (..., k) to cached slots (..., k) by expert id within a token (paper, eq. 7)."""
    same = index[..., :, None] == cached_index[..., None, :]  # (..., branch, slot)
    matched, taken = same.any(-1), same.any(-2)
    free_branch = _count_before(~matched)[..., :, None] == _count_before(~taken)[..., None, :]
    assigned = same | (free_branch & ~matched[..., :, None] & ~taken[..., None, :])
    by_slot = assigned.transpose(-1, -2)  # (..., slot, branch), one true in each row and column
    return Routing(
        (by_slot * index[..., None, :]).sum(-1),
        torch.where(by_slot, weight[..., None, :], 0).sum(-1),
        taken,
    )


def _count_before(flags: Tensor) -> Tensor:
    """For each entry of the last dim, how many entries before it are true."""
    k = flags.shape[-1]
    earlier = torch.ones(k, k, dtype=torch.bool, device=flags.device).tril(-1)
    return (flags[..., None, :] & earlier).sum(-1)


def normalized(weight: Tensor) -> Tensor:
    """Weights scaled to sum to 1 over a token's branches, as the score and tau0 assume."""
    return _share(weight, -1)


def _share(value: Tensor, dim: int) -> Tensor:
    """What each value is of the sum over a dim; 0 where that is 0. A small number to divide by is 0 in float16."""
    total = value.sum(dim, keepdim=True)
    return value / total.where(total > 0, 1)


def score(options: Options, weight: Tensor, cached_weight: Tensor, norms: Tensor, age: Tensor) -> Tensor:
    """Branch-level recomputation score (paper, eq. 9); all arguments (B, N, k) by slot.

    `norms` are those of the cached branch outputs, `age` the steps since a branch was computed.
    """
    drift = (weight - cached_weight).abs()
    if options.score == "drift":
        return drift
    paper = weight + options.lambda1 * drift + options.lambda2 * _share(norms, -1)
    return paper + 0.25 * age / options.full_every if options.score == "staleness" else paper


def routed_by_expert(index: Tensor, experts: int) -> Tensor:
    """Which experts a token is routed to: index (B, N, k) -> (B, N, E) bool."""
    return (index[..., None] == torch.arange(experts, device=index.device)).any(-2)


def activation(options: Options, previous: Tensor, routed: Tensor) -> Tensor:
    """Spatial activation statistic C_e (paper, eq. 10): a moving average of the routing, all (B, N, E)."""
    return options.beta * previous + (1 - options.beta) * routed.to(previous.dtype)


def thresholds(options: Options, statistic: Tensor) -> Tensor:
    """Expert-aware thresholds (paper, eqs. 11 and 12): statistic (B, N, E) -> (B, E)."""
    if options.statistic == "batch":
        statistic = statistic.mean(0, keepdim=True).expand_as(statistic)
    entropy = torch.special.entr(_share(statistic, 1)).sum(1)
    if options.entropy == "minmax":
        low, high = entropy.amin(-1, keepdim=True), entropy.amax(-1, keepdim=True)
        spread = high - low
        entropy = (entropy - low) / spread.where(spread > 0, 1)
    else:
        entropy = entropy / math.log(max(statistic.shape[1], 2))
    return options.tau0 * (1 + options.alpha * (2 * entropy - 1))


def over_threshold(scores: Tensor, threshold: Tensor, index: Tensor) -> Tensor:
    """s > tau_e per branch: scores (B, N, k), threshold (B, E), index (B, N, k) -> (B, N, k) bool."""
    per_token = threshold[:, None, :].expand(-1, index.shape[1], -1)
    return scores > per_token.gather(-1, index)


def within_budget(scores: Tensor, matched: Tensor, budget: float, routed: Tensor | None = None) -> Tensor:
    """The highest-ranked fraction `budget` of each sample's branches, unmatched ones first: (B, N, k) bool.

    `routed` (B, N, k) says which slots are branches; None for all.
    """
    if not budget:
        return torch.zeros_like(matched)
    rank = scores + _UNMATCHED_FIRST * ~matched
    if routed is not None:
        rank = torch.where(routed, rank, -math.inf)
    order = rank.flatten(1).sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    branches = order.shape[1] if routed is None else routed.flatten(1).sum(1, keepdim=True)
    count = round(budget * branches) if isinstance(branches, int) else (budget * branches).round()
    return torch.zeros_like(matched.flatten(1)).scatter(1, order, ranks < count).view_as(matched)


def select(recompute: Tensor, matched: Tensor, scores: Tensor, capacity: int, forced: bool) -> Decision:
    """Choose at most `capacity` tokens a sample to recompute; tensors (B, N, k).

    `forced`, which validation uses, ignores the scores: it takes `capacity` tokens with all their branches.
    """
    if forced:
        chosen, valid = forced_tokens(recompute.shape[0], recompute.shape[1], capacity, recompute.device)
        return Decision(torch.ones_like(recompute), chosen, valid)
    chosen, valid = choose_tokens(recompute, matched, scores, capacity)
    return Decision(recompute, chosen, valid)


def forced_tokens(samples: int, tokens: int, capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`capacity` tokens (B, C), in another order for each sample: validation then notices rows not gathered."""
    positions, offsets = (torch.arange(size, device=device) for size in (tokens, samples))
    chosen = ((offsets[:, None] - positions) % tokens)[:, :capacity]
    return chosen, torch.ones_like(chosen, dtype=torch.bool)


def choose_tokens(recompute: Tensor, matched: Tensor, scores: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """At most `capacity` tokens a sample: those with an unmatched branch first, then by their highest score.

    Ties go to the lower token index. Returns (B, capacity) tokens, and (B, capacity) whether each needs recomputing.
    """
    needed = recompute.any(-1)
    best = torch.where(recompute, scores.to(torch.float32), 0.0).amax(-1)
    rank = needed * (1.0 + best + _UNMATCHED_FIRST * (recompute & ~matched).any(-1))
    order = rank.sort(dim=-1, descending=True, stable=True)
    return order.indices[:, :capacity], order.values[:, :capacity] > 0
