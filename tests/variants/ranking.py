"""Which tokens come first where not all that are wanted fit, and where a ranking is too close to call."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.policies.reference_moeca import within_capacity

EDGES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""By the model's dtype: decisions nearer to their other side than this may go either way by rounding."""


def first_tokens(wanted: Tensor, scores: Tensor, matched: Tensor, capacity: int, edge: float) -> tuple[Tensor, bool]:
    """`wanted` of the first `capacity` tokens of each sample, and whether it was close; arguments (B, N, any)."""
    recomputed, tokens = within_capacity(wanted, scores, matched, capacity), wanted.any(-1)
    if not bool((tokens.sum(-1) > capacity).any()):
        return recomputed, False
    best = torch.where(wanted, scores, scores.new_zeros(())).amax(-1)
    urgent = (wanted & ~matched).any(-1)
    return recomputed, ranks_are_close(best, ~urgent, recomputed.any(-1), edge, tokens)


def ranks_are_close(scores: Tensor, matched: Tensor, taken: Tensor, edge: float, of: Tensor | None = None) -> bool:
    """Whether the last that is taken and the first that is not have nearly the same rank, in any sample.

    Equal ranks are not close: they come from weights and shares of exactly 1, and go by the order of tokens.
    """
    of = torch.ones_like(taken) if of is None else of
    ranks = scores + 100.0 * ~matched
    for rank, inside, there in zip(ranks, taken, of, strict=True):
        last, first = rank[inside & there], rank[~inside & there]
        if last.numel() and first.numel() and 0 != float(last.min() - first.max()) < edge:
            return True
    return False
