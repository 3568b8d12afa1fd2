"""MoE layers in which experts take tokens, so that tokens have no fixed number of experts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture.layers import WIDTH, MoE, swiglu

EXPERTS = 4


class Choice(MoE):
    """A router and experts that take `capacity` tokens each, of a sample or of a batch."""

    def __init__(self, expert=swiglu, experts: int = EXPERTS, factor: float = 1.5) -> None:
        super().__init__(2, expert, experts)
        self.num_experts, self.factor = experts, factor

    def capacity(self, tokens: int) -> int:
        return math.ceil(self.factor * tokens / self.num_experts)


class GatherStack(Choice):
    """Each expert's tokens of a sample by gather, outputs stacked, scatter_add_."""

    def forward(self, x):
        b, n, d = x.shape
        scores = self.router(x).softmax(dim=-1).transpose(1, 2)
        weight, index = torch.topk(scores, self.capacity(n), dim=-1)
        places = index.reshape(b, -1, 1).expand(-1, -1, d)
        rows = torch.gather(x, 1, places).view(b, self.num_experts, -1, d)
        outputs = torch.stack([expert(rows[:, e]) for e, expert in enumerate(self.experts)], dim=1)
        out = torch.zeros_like(x)
        out.scatter_add_(1, places, (outputs * weight.unsqueeze(-1)).view(b, -1, d))
        return out


class FlatLoop(Choice):
    """The tokens of the whole batch; a loop with an index_add_ for each expert. Samples are coupled."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        scores = self.router(rows).softmax(-1)
        gates, ids = scores.t().topk(self.capacity(len(rows)), dim=-1)
        out = torch.zeros_like(rows)
        for e in range(self.num_experts):
            token = ids[e]
            out.index_add_(0, token, self.experts[e](rows[token]) * gates[e].unsqueeze(-1))
        return out.view_as(x)


class FlatZip(Choice):
    """The same with ids (choices, experts), a zip over what each expert takes, and `+=`."""

    def forward(self, x):
        rows = x.flatten(0, 1)
        gates, ids = self.router(rows).sigmoid().topk(self.capacity(len(rows)), dim=0)
        out = torch.zeros_like(rows)
        for expert, token, gate in zip(self.experts, ids.unbind(1), gates.unbind(1), strict=True):
            out[token] += gate[:, None] * expert(rows[token])
        return out.reshape(x.shape)


class SampleLoop(Choice):
    """A loop with gather and scatter_add_ for each expert; ids (samples, choices, experts)."""

    def forward(self, x):
        n, d = x.shape[1:]
        affinity = self.router(x).softmax(dim=1)
        score, index = affinity.topk(self.capacity(n), dim=1)
        y = x.new_zeros(x.shape)
        for e, expert in enumerate(self.experts):
            at = index[..., e].unsqueeze(-1).expand(-1, -1, d)
            y.scatter_add_(1, at, expert(x.gather(1, at)) * score[..., e, None])
        return y


class EachSample(Choice):
    """Two loops, over samples and experts, rows by index_select."""

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        gate, choice = scores.permute(0, 2, 1).topk(self.capacity(x.shape[1]), dim=2, sorted=False)
        samples = torch.arange(x.shape[0]).view(-1, 1, 1)
        rows = x[samples, choice]
        outputs = torch.zeros_like(rows)
        for e in range(self.num_experts):
            outputs[:, e] = self.experts[e](rows[:, e])
        out = torch.zeros_like(x)
        return out.index_put_((samples.expand_as(choice), choice), gate[..., None] * outputs, accumulate=True)


class OneHot(Choice):
    """EC-DiT as in paper 004, algorithm 1: dispatch and combine by one-hot einsums."""

    def forward(self, x):
        scores = self.router(x).softmax(dim=-1).permute(0, 2, 1)
        gating, index = torch.topk(scores, k=self.capacity(x.shape[1]), dim=-1)
        dispatch = F.one_hot(index, num_classes=x.shape[1]).to(x.dtype)
        x_in = torch.einsum("becs,bsd->becd", dispatch, x)
        x_e = torch.stack([self.experts[e](x_in[:, e]) for e in range(self.num_experts)], dim=1)
        return torch.einsum("becs,bec,becd->bsd", dispatch, gating, x_e)


class OneHotCombine(Choice):
    """Weights within the combining tensor, a shared expert beside."""

    def __init__(self, expert=swiglu) -> None:
        super().__init__(expert)
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        probs = F.softmax(self.router(x), dim=-1)
        weight, picked = probs.transpose(1, 2).topk(self.capacity(x.size(1)))
        place = F.one_hot(picked, x.size(1)).type_as(x)
        combine = place * weight.unsqueeze(-1)
        rows = torch.einsum("bnd,becn->becd", x, place)
        outs = [expert(rows[:, number]) for number, expert in enumerate(self.experts)]
        return torch.einsum("becn,becd->bnd", combine, torch.stack(outs, dim=1)) + self.shared(x)


class OneHotWeighted(Choice):
    """Outputs weighted before they are put back."""

    def forward(self, x):
        affinity = self.router(x).softmax(-1).transpose(-1, -2)
        g, i = affinity.topk(self.capacity(x.shape[1]), dim=-1)
        p = F.one_hot(i, x.shape[1]).float()
        xe = torch.einsum("becn,bnd->becd", p, x)
        ye = torch.stack([f(xe[:, e]) for e, f in enumerate(self.experts)], 1) * g[..., None]
        return torch.einsum("becn,becd->bnd", p, ye)


class OverASample(Choice):
    """Weights that sum to one over a token's experts, after the selection."""

    def forward(self, x):
        b, n, d = x.shape
        scores = self.router(x).sigmoid().transpose(1, 2)
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
        return out.view(b, n, d)


class OntoShared(Choice):
    """The experts' outputs are added onto a shared expert's, and weights looked up in all scores."""

    def __init__(self, expert=swiglu) -> None:
        super().__init__(expert)
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        scores = self.router(rows).softmax(-1)
        order = scores.argsort(dim=0, descending=True)[: self.capacity(len(rows))]
        out = self.shared(rows)
        for e in range(self.num_experts):
            token = order[:, e]
            out = out.index_add(0, token, self.experts[e](rows[token]) * scores[token, e].unsqueeze(-1))
        return out.view_as(x)


class Chooser(nn.Module):
    """A router as a module of its own: ids and weights (samples, experts, choices)."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, EXPERTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, index = self.proj(x).softmax(-1).transpose(1, 2).topk(4, dim=-1)
        return index, weight


class ChosenElsewhere(Choice):
    """The router is another module, and zeros are written to through a view."""

    def __init__(self, expert=swiglu) -> None:
        super().__init__(expert)
        self.chooser = Chooser()

    def forward(self, x):
        b, n, d = x.shape
        ids, gates = self.chooser(x)
        flat = (ids + torch.arange(b)[:, None, None] * n).reshape(-1)
        rows = x.reshape(-1, d).index_select(0, flat).view(b, self.num_experts, -1, d)
        outputs = torch.stack([self.experts[e](rows[:, e]) for e in range(self.num_experts)], dim=1)
        out = torch.zeros_like(x)
        out.view(-1, d).index_add_(0, flat, (outputs * gates[..., None]).reshape(-1, d))
        return out


class Handed(ChosenElsewhere):
    """A method that is handed the ids and does nothing but dispatch."""

    def forward(self, x):
        ids, gates = self.chooser(x)
        return self.run_experts(x, ids, gates)

    def run_experts(self, x, ids, gates):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            at = ids[:, e].unsqueeze(-1).expand(-1, -1, x.shape[-1])
            out.scatter_add_(1, at, expert(x.gather(1, at)) * gates[:, e, :, None])
        return out


class Joined(Choice):
    """Outputs put beside each other, one index_add_ for all."""

    def forward(self, x):
        rows = x.flatten(0, 1)
        gates, ids = self.router(rows).softmax(-1).topk(8, dim=0)
        outputs = []
        for e, expert in enumerate(self.experts):
            outputs.append(expert(rows[ids[:, e]]) * gates[:, e, None])
        out = torch.zeros_like(rows)
        out.index_add_(0, ids.t().reshape(-1), torch.cat(outputs))
        return out.view_as(x)


class Packed(nn.Module):
    """Experts packed in one parameter for each matrix."""

    def __init__(self, experts: int = EXPERTS, hidden: int = 16, factor: float = 1.5) -> None:
        super().__init__()
        self.num_experts, self.factor = experts, factor
        self.w_r = nn.Parameter(torch.randn(WIDTH, experts))
        self.w1 = nn.Parameter(torch.randn(experts, WIDTH, hidden) * WIDTH**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, WIDTH) * hidden**-0.5)
        self.b1 = nn.Parameter(torch.randn(experts, hidden))
        self.b2 = nn.Parameter(torch.randn(experts, WIDTH))

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.topk(math.ceil(self.factor * scores.shape[-1] / self.num_experts), dim=-1)


class PackedEinsum(Packed):
    """einsum over experts, rows gathered from copies of x."""

    def forward(self, x):
        b, n, d = x.shape
        logits = torch.einsum("bsd,de->bse", x, self.w_r)
        gating, index = logits.softmax(-1).transpose(1, 2).topk(math.ceil(self.factor * n / self.num_experts), dim=-1)
        at = index.unsqueeze(-1).expand(-1, -1, -1, d)
        rows = x.unsqueeze(1).expand(-1, self.num_experts, -1, -1).gather(2, at)
        h = F.gelu(torch.einsum("becd,edh->bech", rows, self.w1) + self.b1[None, :, None, :])
        y = torch.einsum("bech,ehd->becd", h, self.w2) + self.b2[:, None]
        y = y * gating[..., None]
        return torch.zeros_like(x).scatter_add(1, at.reshape(b, -1, d), y.reshape(b, -1, d))


class PackedBmm(Packed):
    """Rows sorted by expert through the batch, bmm."""

    def forward(self, x):
        b, n, d = x.shape
        scores = (x @ self.w_r).softmax(-1).transpose(1, 2)
        gating, index = torch.topk(scores, k=math.ceil(self.factor * n / self.num_experts), dim=-1)
        token = (index + torch.arange(b)[:, None, None] * n).transpose(0, 1).reshape(self.num_experts, -1)
        weight = gating.transpose(0, 1).reshape(self.num_experts, -1)
        rows = x.reshape(b * n, d)[token]
        y = torch.bmm(F.silu(torch.bmm(rows, self.w1)), self.w2)
        y = (y * weight.unsqueeze(-1)).view(-1, d)
        out = x.new_zeros(b * n, d)
        out.index_add_(0, token.reshape(-1), y)
        return out.view(b, n, d)


class PackedTurned(Packed):
    """Rows gathered sample by sample and turned for bmm."""

    def forward(self, x):
        b, n, d = x.shape
        scores = (x @ self.w_r).softmax(-1).transpose(1, 2)
        gating, index = scores.topk(math.ceil(self.factor * n / self.num_experts), dim=-1)
        c = index.shape[-1]
        at = index.reshape(b, -1, 1).expand(-1, -1, d)
        rows = x.gather(1, at).view(b, self.num_experts, c, d).transpose(0, 1).reshape(self.num_experts, b * c, d)
        h = torch.relu(torch.matmul(rows, self.w1) + self.b1.unsqueeze(1))
        y = torch.matmul(h, self.w2).view(self.num_experts, b, c, d).transpose(0, 1)
        y = (y * gating.unsqueeze(-1)).reshape(b, -1, d)
        return torch.zeros_like(x).scatter_add_(1, at, y)


PER_SAMPLE = (
    GatherStack,
    SampleLoop,
    EachSample,
    OneHot,
    OneHotCombine,
    OneHotWeighted,
    OverASample,
    ChosenElsewhere,
    Handed,
    PackedEinsum,
    PackedBmm,
    PackedTurned,
)
OVER_THE_BATCH = (FlatLoop, FlatZip, OntoShared, Joined)
