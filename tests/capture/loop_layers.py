"""MoE layers whose experts choose their tokens in a loop: by a capacity that is predicted, or by a threshold."""

from __future__ import annotations

import torch
from torch import nn

from tests.capture.layers import WIDTH, MoE, swiglu
from tests.capture.pair_layers import EXPERTS


class Predicted(MoE):
    """A router, a capacity predictor, and a threshold for each expert."""

    def __init__(self, expert=swiglu, experts: int = EXPERTS) -> None:
        super().__init__(2, expert, experts)
        self.capacity_predictor = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, experts))
        self.register_buffer("threshold", torch.linspace(0.4, 0.6, experts))


class DiffMoE(Predicted):
    """Paper 004, algorithm 4."""

    def forward(self, x):
        shape = x.shape
        x = x.view(-1, shape[-1])
        capacity_pred = torch.sigmoid(self.capacity_predictor(x.detach()))
        scores = self.router(x).softmax(dim=-1).permute(-1, -2)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            k_pred = torch.sum(torch.where(capacity_pred[:, i] > self.threshold[i], 1, 0)).item()
            if k_pred == 0:
                continue
            gating, index = torch.topk(scores[i], k=k_pred, dim=-1, sorted=False)
            y[index, :] = y[index, :] + gating.unsqueeze(-1) * expert(x[index, :])
        return y.view(shape)


class CountedFirst(Predicted):
    """All counts read at once, at least one token an expert, scores looked up."""

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        scores = self.router(rows).softmax(-1)
        wanted = self.capacity_predictor(rows).sigmoid() > self.threshold
        counts = wanted.sum(dim=0).cpu().tolist()
        out = torch.zeros_like(rows)
        for e in range(len(self.experts)):
            k = max(1, min(counts[e], len(rows)))
            token = scores[:, e].topk(k).indices
            out.index_add_(0, token, self.experts[e](rows[token]) * scores[token, e][:, None])
        return out.view_as(x)


class SortAndSlice(Predicted):
    """One sort for all experts, the first of each taken; weights from the scores, in an order of their own."""

    def forward(self, x):
        rows = x.flatten(0, 1)
        scores = self.router(rows).sigmoid()
        values, order = scores.sort(dim=0, descending=True)
        wanted = (torch.sigmoid(self.capacity_predictor(rows)) > self.threshold).sum(0)
        out = torch.zeros_like(rows)
        for e, (expert, k) in enumerate(zip(self.experts, wanted.tolist(), strict=True)):
            token = order[:k, e]
            out = out.index_add(0, token, values[:k, e, None] * expert(rows[token]))
        return out.reshape(x.shape)


class ArgsortAndSlice(Predicted):
    """The same for each expert by itself, with int()."""

    def forward(self, x):
        rows = x.flatten(0, 1)
        affinity = self.router(rows).softmax(-1).t()
        capacity = self.capacity_predictor(rows).sigmoid()
        out = rows.new_zeros(rows.shape)
        for e, expert in enumerate(self.experts):
            k = int((capacity[:, e] > self.threshold[e]).sum())
            token = affinity[e].argsort(descending=True)[:k]
            out.index_add_(0, token, affinity[e, token].unsqueeze(1) * expert(rows[token]))
        return out.view_as(x)


class OntoShared(Predicted):
    """Added onto a shared expert's output, counts read one by one."""

    def __init__(self, expert=swiglu) -> None:
        super().__init__(expert)
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        scores = self.router(rows).softmax(-1)
        counts = (self.capacity_predictor(rows).sigmoid() > self.threshold).sum(0)
        y = self.shared(rows)
        for e in range(len(self.experts)):
            k = counts[e].item()
            if k > 0:
                gate, token = scores[:, e].topk(k)
                y = y.index_add(0, token, gate.unsqueeze(1) * self.experts[e](rows[token]))
        return y.view_as(x)


class Threshold(MoE):
    """A token takes every expert whose score is over a threshold."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        scores = self.router(rows).sigmoid()
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mask = scores[:, e] > 0.5
            if mask.any():
                y[mask] += scores[mask, e].unsqueeze(-1) * expert(rows[mask])
        return y.view_as(x)


class MaskOfAll(MoE):
    """The mask (tokens, experts) made before the loop, weights that sum to one under it."""

    def forward(self, x):
        flat = x.flatten(0, 1)
        scores = self.router(flat).softmax(-1)
        mask = scores >= 1.0 / len(self.experts)
        w = scores * mask
        w = w / w.sum(-1, keepdim=True)
        y = torch.zeros_like(flat)
        for e in range(len(self.experts)):
            y[mask[:, e]] += w[mask[:, e], e, None] * self.experts[e](flat[mask[:, e]])
        return y.reshape(x.shape)


class PlacesOfAMask(MoE):
    """Places by torch.where and nonzero, index_add_; a mean over a token's experts."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        scores = self.router(rows).sigmoid()
        taken = scores > 0.6
        share = taken / taken.sum(-1, keepdim=True).clamp(min=1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token = torch.nonzero(taken[:, e]).squeeze(-1)
            out.index_add_(0, token, expert(rows[token]) * share[:, e][token].unsqueeze(1))
        return out.view(x.shape) + x


class PlacesInSamples(MoE):
    """Tokens of (samples, tokens, width) without a view; two indices for each."""

    def forward(self, x):
        gate = self.router(x).sigmoid()
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            sample, place = torch.where(gate[..., e] > 0.5)
            out[sample, place] += gate[sample, place, e].unsqueeze(-1) * expert(x[sample, place])
        return out


class OfTheBatch(MoE):
    """A threshold that all tokens of the batch make: samples are coupled."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        scores = self.router(rows).sigmoid()
        limit = scores.mean()
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            (token,) = torch.where(scores[:, e] > limit)
            out[token] += scores[token, e, None] * expert(rows[token])
        return out.view_as(x)


class FixedInTheLoop(MoE):
    """A top-k of fixed size for each expert, in the loop."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        scores = self.router(rows).softmax(-1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            gate, token = scores[:, e].topk(8)
            out.index_add_(0, token, expert(rows[token]) * gate[:, None])
        return out.view_as(x)


DYNAMIC = (DiffMoE, CountedFirst, SortAndSlice, ArgsortAndSlice, OntoShared)
THRESHOLDS = (Threshold, MaskOfAll, PlacesOfAMask, PlacesInSamples)
