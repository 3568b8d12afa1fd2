"""A router's choice as one op: from logits to the ids and weights of each token's experts.

    choose_experts(logits, bias, k, ...) -> ids, weights

        score[t] = softmax(logits[t]), sigmoid(logits[t]) or logits[t]
        ids[t] = the k greatest of score[t] + bias, within the best groups of experts where there are groups
        weights[t] = score[t, ids[t]], normalized and scaled

No model calls it. `lower.fuse_routers` puts it in place of the ops that say the same, where a kernel can run it
(`ops.triton.routing`). The function here is the kernel's reference, and runs on every other device.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE, SOFTMAX, SIGMOID, SUM = "none", "softmax", "sigmoid", "sum"
"""How logits become scores (none, softmax, sigmoid), and how weights are normalized (none, softmax, sum)."""

_library = torch.library.Library("moeca", "FRAGMENT")
_library.define(
    "choose_experts(Tensor logits, Tensor? bias, int k, str scores, int groups, int kept_groups, int best_of, "
    "float fill, bool gathered, str norm, float eps, float scale, ScalarType dtype, ScalarType weight_dtype) "
    "-> (Tensor, Tensor)"
)


def choose_experts(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    scores: str,
    groups: int,
    kept_groups: int,
    best_of: int,
    fill: float,
    gathered: bool,
    norm: str,
    eps: float,
    scale: float,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Choose k experts for each token (DeepSeek-V3, eqs. 13 to 16, and the simpler routers before it).

    Args:
        logits: (T, E).
        bias: (E,), added to scores for the choice alone; or None.
        k: experts a token.
        scores: NONE, SOFTMAX or SIGMOID of the logits.
        groups: number of groups of E / groups neighbors; 1 for none.
        kept_groups: how many groups a token may choose from.
        best_of: the value of a group is the sum of so many of its greatest (biased) scores.
        fill: what experts outside of the kept groups have in place of a score.
        gathered: weights are the scores of the chosen; else what they were chosen by (with bias or `fill`).
        norm: NONE; SUM, weights / (sum of a token's weights + eps); or SOFTMAX over a token's weights.
        eps: see `norm`.
        scale: a factor of the weights, after normalization.
        dtype: each result is rounded to this dtype, that of the scores.
        weight_dtype: dtype of the weights.

    Returns:
        (T, k) int64 ids, by value, the greatest first; ties go as in torch.topk on that device.
        (T, k) weights.
    """
    score = _scores(logits.to(dtype) if scores == NONE else logits, scores, dtype)
    value = score if bias is None else score + bias
    if groups > 1:
        by_group = value.unflatten(-1, (groups, -1))
        goodness = by_group.topk(best_of).values.sum(-1)
        kept = torch.zeros_like(goodness, dtype=torch.bool).scatter(-1, goodness.topk(kept_groups).indices, True)
        value = by_group.masked_fill(~kept.unsqueeze(-1), fill).flatten(-2)
    weights, ids = value.topk(k)
    weights = _normalized(score.gather(-1, ids) if gathered else weights, norm, eps)
    return ids, (weights * scale).to(weight_dtype)


def _scores(logits: Tensor, scores: str, dtype: torch.dtype) -> Tensor:
    if scores == SOFTMAX:
        return logits.softmax(-1, dtype=dtype)
    return logits.to(dtype).sigmoid() if scores == SIGMOID else logits


def _normalized(weights: Tensor, norm: str, eps: float) -> Tensor:
    if norm == SOFTMAX:
        return weights.softmax(-1)
    return weights / (weights.sum(-1, keepdim=True) + eps) if norm == SUM else weights


_library.impl("choose_experts", choose_experts, "CompositeExplicitAutograd")


@torch.library.register_fake("moeca::choose_experts", lib=_library)
def _(logits, bias, k, *_others):  # type: ignore[no-untyped-def]
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=_others[-1])
