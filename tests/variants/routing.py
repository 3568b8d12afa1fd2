"""Routers: how a token's experts and their weights are chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """How a router chooses.

    scores: "softmax" or "sigmoid"
    choice: "raw" top-k of the scores; "renormalized" to a sum of 1; "scaled" after that; "bias", the choice by
        scores plus a learned bias, the weights without it; "groups", the best experts of the best half of groups
    wide: whether the router computes in float32 whatever the model's dtype
    """

    experts: int = 4
    top_k: int = 2
    scores: str = "softmax"
    choice: str = "renormalized"
    wide: bool = False


class Router(nn.Module):
    """x (..., width) -> expert ids and weights, (..., k) each."""

    def __init__(self, routing: Routing, width: int) -> None:
        super().__init__()
        self.routing = routing
        # Wide enough that experts change from step to step.
        self.weight = nn.Parameter(2 * torch.randn(routing.experts, width) / width**0.5)
        self.correction = nn.Parameter(0.1 * torch.randn(routing.experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = self.choose(self.scores(x))
        return ids, weights.to(x.dtype)

    def scores(self, x: Tensor) -> Tensor:
        wide = self.routing.wide
        logits = F.linear(x.float(), self.weight.float()) if wide else F.linear(x, self.weight)
        return logits.softmax(dim=-1) if self.routing.scores == "softmax" else logits.sigmoid()

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        k, choice = self.routing.top_k, self.routing.choice
        if choice == "bias":
            ids = torch.topk(scores + self.correction, k, dim=-1)[1]
            weights = scores.gather(-1, ids)
            return ids, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if choice == "groups":
            ids = torch.topk(in_best_groups(scores), k, dim=-1, sorted=False)[1]
            weights = scores.gather(-1, ids)
            return ids, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5
        weights, ids = torch.topk(scores, k, dim=-1)
        if choice == "raw":
            return ids, weights
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return ids, weights * 1.5 if choice == "scaled" else weights


def in_best_groups(scores: Tensor) -> Tensor:
    """Scores of the experts in the better half of four groups, 0 for the others."""
    grouped = scores.unflatten(-1, (4, -1))
    best = grouped.amax(dim=-1).topk(2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(grouped[..., 0]).scatter_(-1, best, 1)
    wanted = mask.unsqueeze(-1).expand(grouped.shape).reshape(scores.shape)
    return scores.masked_fill(~wanted.bool(), 0.0)
