"""MoE layers in which experts take tokens, so that tokens have no fixed number of experts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dit import SwiGLU
from tests.variants.dispatch import Layer, Layering
from tests.variants.experts import BODIES


class PairLayer(Layer):
    """What all of them share; `pairs` is what they mean. They read (B, N, width).

    coupled: whether a sample's routing depends on the others
    """

    coupled = False
    by_the_data = False

    def __init__(self, how: Layering, width: int) -> None:
        nn.Module.__init__(self)
        self.how, self.num_experts = how, how.routing.experts
        self.router = nn.Linear(2 * width if how.reads in ("timed", "both") else width, self.num_experts, bias=False)
        self.shared_experts = nn.ModuleList(SwiGLU(width, hidden) for hidden in how.shared)
        self.experts = nn.ModuleList(BODIES[how.body](width, how.hidden, how.bias) for _ in range(self.num_experts))

    def capacity(self, tokens: int) -> int:
        """How many of so many tokens an expert takes."""
        return min(tokens, math.ceil(self.how.routing.top_k * tokens / self.num_experts))

    def scores(self, seen: Tensor) -> Tensor:
        """(B, N, experts)"""
        logits = self.router(seen)
        return logits.softmax(dim=-1) if self.how.routing.scores == "softmax" else logits.sigmoid()

    def pairs(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Which (token, expert) pairs are routed, and their weights, (B, N, experts) both."""
        return self.routed_by(x, self.scores(seen))

    def routed_by(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        flat = scores.flatten(0, 1)[None] if self.coupled else scores
        taken = flat.topk(self.capacity(flat.shape[1]), dim=1).indices
        return torch.zeros_like(flat).scatter(1, taken, 1).bool().view_as(scores), scores

    def branches(self, batch: int, tokens: int) -> int:
        """How many pairs there are in a call, 0 where only the data tell."""
        if self.by_the_data:
            return 0
        return self.num_experts * (self.capacity(batch * tokens) if self.coupled else batch * self.capacity(tokens))


class ChoiceStack(PairLayer):
    """Each expert's tokens of a sample by gather, outputs stacked, scatter_add_."""

    def forward(self, x, seen, extra):
        b, n, d = x.shape
        scores = self.scores(seen).transpose(1, 2)
        weight, index = torch.topk(scores, self.capacity(n), dim=-1)
        places = index.reshape(b, -1, 1).expand(-1, -1, d)
        rows = torch.gather(x, 1, places).view(b, self.num_experts, -1, d)
        outputs = torch.stack([expert(rows[:, e]) for e, expert in enumerate(self.experts)], dim=1)
        out = torch.zeros_like(x)
        out.scatter_add_(1, places, (outputs * weight.unsqueeze(-1)).view(b, -1, d))
        return self.with_shared(out, x)


class ChoiceLoop(PairLayer):
    """gather and scatter_add_ for each expert; ids (samples, choices, experts)."""

    def forward(self, x, seen, extra):
        n, d = x.shape[1:]
        score, index = self.scores(seen).topk(self.capacity(n), dim=1)
        y = x.new_zeros(x.shape)
        for e, expert in enumerate(self.experts):
            at = index[..., e].unsqueeze(-1).expand(-1, -1, d)
            y.scatter_add_(1, at, expert(x.gather(1, at)) * score[..., e, None])
        return self.with_shared(y, x)


class ChoiceOneHot(PairLayer):
    """Dispatch and combine by one-hot einsums (as EC-DiT's)."""

    def forward(self, x, seen, extra):
        scores = self.scores(seen).permute(0, 2, 1)
        gating, index = torch.topk(scores, k=self.capacity(x.shape[1]), dim=-1)
        dispatch = F.one_hot(index, num_classes=x.shape[1]).to(x.dtype)
        x_in = torch.einsum("becs,bsd->becd", dispatch, x)
        x_e = torch.stack([self.experts[e](x_in[:, e]) for e in range(self.num_experts)], dim=1)
        return self.with_shared(torch.einsum("becs,bec,becd->bsd", dispatch, gating, x_e), x)


class ChoiceNormalized(PairLayer):
    """Weights that sum to one over a token's experts, after the choice."""

    def forward(self, x, seen, extra):
        b, n, d = x.shape
        scores = self.scores(seen).transpose(1, 2)
        index = scores.topk(self.capacity(n), dim=-1).indices
        mask = torch.zeros_like(scores).scatter(2, index, 1.0)
        gates = scores * mask
        gates = gates / gates.sum(dim=1, keepdim=True).clamp_min(1e-9)
        weight = gates.gather(2, index)
        flat = (index + torch.arange(b).view(b, 1, 1) * n).transpose(0, 1).reshape(self.num_experts, -1)
        w = weight.transpose(0, 1).reshape(self.num_experts, -1)
        rows, out = x.reshape(b * n, d), x.new_zeros(b * n, d)
        for e, expert in enumerate(self.experts):
            out = out.index_add(0, flat[e], expert(rows[flat[e]]) * w[e, :, None])
        return self.with_shared(out.view(b, n, d), x)

    def routed_by(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        routed, scores = super().routed_by(x, scores)
        gates = scores * routed
        return routed, gates / gates.sum(dim=-1, keepdim=True).clamp_min(1e-9)


class ChoiceOverBatch(PairLayer):
    """Each expert takes from the tokens of the whole batch."""

    coupled = True

    def forward(self, x, seen, extra):
        rows = x.reshape(-1, x.shape[-1])
        scores = self.scores(seen).flatten(0, 1)
        gates, ids = scores.t().topk(self.capacity(len(rows)), dim=-1)
        out = torch.zeros_like(rows)
        for e in range(self.num_experts):
            token = ids[e]
            out.index_add_(0, token, self.experts[e](rows[token]) * gates[e].unsqueeze(-1))
        return self.with_shared(out.view_as(x), x)


class Predicted(PairLayer):
    """As many tokens of the whole batch as a capacity predictor says, which only the data tell."""

    coupled = True
    by_the_data = True

    def __init__(self, how: Layering, width: int) -> None:
        super().__init__(how, width)
        self.capacity_predictor = nn.Linear(width, self.num_experts)
        self.register_buffer("threshold", torch.linspace(0.4, 0.6, self.num_experts))

    def counts(self, rows: Tensor) -> Tensor:
        return (torch.sigmoid(self.capacity_predictor(rows)) > self.threshold).sum(0)

    def routed_by(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        flat = scores.flatten(0, 1)
        places = flat.argsort(dim=0, descending=True).argsort(dim=0)
        return (places < self.counts(x.flatten(0, 1))).view_as(scores), scores


class PredictedTopk(Predicted):
    """A top-k of a predicted k for each expert, read on the host (as DiffMoE's)."""

    def forward(self, x, seen, extra):
        shape = x.shape
        rows = x.reshape(-1, shape[-1])
        capacity_pred = torch.sigmoid(self.capacity_predictor(rows))
        scores = self.scores(seen).flatten(0, 1).permute(-1, -2)
        y = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            k_pred = torch.sum(torch.where(capacity_pred[:, i] > self.threshold[i], 1, 0)).item()
            if k_pred == 0:
                continue
            gating, index = torch.topk(scores[i], k=k_pred, dim=-1, sorted=False)
            y[index, :] = y[index, :] + gating.unsqueeze(-1) * expert(rows[index, :])
        return self.with_shared(y.view(shape), x)


class PredictedSlice(Predicted):
    """A predicted number of tokens for each expert, the first ones of one sort."""

    def forward(self, x, seen, extra):
        rows = x.flatten(0, 1)
        values, order = self.scores(seen).flatten(0, 1).sort(dim=0, descending=True)
        wanted = (torch.sigmoid(self.capacity_predictor(rows)) > self.threshold).sum(0)
        out = torch.zeros_like(rows)
        for e, (expert, k) in enumerate(zip(self.experts, wanted.tolist(), strict=True)):
            token = order[:k, e]
            out = out.index_add(0, token, values[:k, e, None] * expert(rows[token]))
        return self.with_shared(out.reshape(x.shape), x)


class OverThreshold(PairLayer):
    """A token takes every expert whose score is over a threshold."""

    by_the_data = True

    def forward(self, x, seen, extra):
        rows = x.reshape(-1, x.shape[-1])
        scores = self.scores(seen).flatten(0, 1)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mask = scores[:, e] > 1 / self.num_experts
            if mask.any():
                y[mask] += scores[mask, e].unsqueeze(-1) * expert(rows[mask])
        return self.with_shared(y.view_as(x), x)

    def routed_by(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores > 1 / self.num_experts, scores


PAIRED: dict[str, type[PairLayer]] = {
    "choice_stack": ChoiceStack,
    "choice_loop": ChoiceLoop,
    "choice_one_hot": ChoiceOneHot,
    "choice_normalized": ChoiceNormalized,
    "choice_over_batch": ChoiceOverBatch,
    "predicted_topk": PredictedTopk,
    "predicted_slice": PredictedSlice,
    "over_threshold": OverThreshold,
}
