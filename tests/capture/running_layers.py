"""MoE layers whose code no idiom reads: statements beside a dispatch, spellings of it, what only some rows take."""

from __future__ import annotations

import contextlib
import logging

import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.layers import EXPERTS, WIDTH, MoE

log = logging.getLogger(__name__)

NONE = 10
"""The label of samples without one."""


class Loop(MoE):
    """A loop over experts with places to put other things."""

    def before(self, rows, index):
        return index

    def picked(self, rows, token):
        return rows[token]

    def made(self, y, like):
        return y

    def after(self, out, index):
        return out

    def route_to_experts(self, rows, index, weight):
        index = self.before(rows, index)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            y = self.made(expert(self.picked(rows, token)), rows)
            out.index_add_(0, token, y * weight[token, slot, None])
        return self.after(out, index)


class KeepsTheRouting(Loop):
    """The routing and a counter, kept as attributes."""

    def after(self, out, index):
        self.last = index.detach()
        self.steps = getattr(self, "steps", 0) + 1
        return out


class CountsUse(Loop):
    """A buffer that counts how often each expert was chosen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("used", torch.zeros(EXPERTS))

    def before(self, rows, index):
        self.used += torch.bincount(index.reshape(-1), minlength=EXPERTS)
        return index


class LogsAndChecks(Loop):
    """Checks of values, logging, try, with and assert."""

    def before(self, rows, index):
        try:
            if not rows.isfinite().all():
                log.warning("not finite")
        finally:
            log.debug("%s rows", len(rows))
        with contextlib.suppress(ValueError):
            assert rows.dim() == 2
        return index


class Casts(Loop):
    """Casts of what enters an expert and of what it returns."""

    def picked(self, rows, token):
        return rows[token].double().to(rows.dtype)

    def made(self, y, like):
        return y.type_as(like)


class Closure(Loop):
    """A function defined in the layer, and a sum over a generator."""

    def after(self, out, index):
        def scaled(value, by):
            return value * by

        return sum(scaled(part, 0.5) for part in (out, out))


class ThroughNumpy(MoE):
    """Rows are sorted on the host, in NumPy."""

    def route_to_experts(self, rows, index, weight):
        ids = index.reshape(-1).cpu().numpy()
        out = rows.new_zeros(rows.shape)
        for e in sorted(set(ids.tolist())):
            branch = torch.from_numpy((ids == e).nonzero()[0])
            token = branch // self.top_k
            out[token] += self.experts[e](rows[token]) * weight.reshape(-1)[branch].unsqueeze(1)
        return out


class Split(MoE):
    """Groups are run together and put back in another method, by gathers."""

    def route_to_experts(self, rows, index, weight):
        order = index.flatten().argsort(stable=True)
        made = self.run(rows[order // self.top_k], torch.bincount(index.flatten(), minlength=EXPERTS))
        return self.put_back(made, order, weight)

    def run(self, rows, counts):
        parts = rows.split(counts.tolist())
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])

    def put_back(self, made, order, weight):
        back = made[order.argsort()].unflatten(0, weight.shape)
        return torch.einsum("tkd,tk->td", back, weight)


class TouchesIdleOnes(MoE):
    """Experts without tokens run on a row of ones, times zero."""

    def route_to_experts(self, rows, index, weight):
        out = torch.zeros_like(rows)
        for e in range(EXPERTS):
            token = torch.where((index == e).any(-1))[0]
            if len(token):
                factor = (weight[token] * (index[token] == e)).sum(-1)
                out.index_add_(0, token, self.experts[e](rows[token]) * factor[:, None])
            else:
                out = out + 0 * self.experts[e](torch.ones(1, WIDTH)).sum()
        return out


class Unweighted(MoE):
    """Sorted rows whose sum has no weights."""

    def route_to_experts(self, rows, index, weight):
        ids, out = index.view(-1), torch.zeros_like(rows)
        order = ids.argsort()
        ends = ids.bincount().cpu().numpy().cumsum(0)
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            token = order[start:end] // self.top_k
            out.index_add_(0, token, self.experts[e](rows[token]))
        return out


class OntoTheRows(MoE):
    """The sum starts from what is no zero, and each expert runs once a slot."""

    def route_to_experts(self, rows, index, weight):
        out = rows.clone()
        for e, expert in enumerate(self.experts):
            for slot in range(self.top_k):
                chosen = index[:, slot] == e
                if chosen.any():
                    out[chosen] = torch.addcmul(out[chosen], expert(rows[chosen]), weight[chosen, slot, None])
        return out


class OfADict(MoE):
    """Experts in a ModuleDict, and a map of bools with probabilities."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleDict({f"expert {e}": expert for e, expert in enumerate(self.experts)})

    def forward(self, x):
        probs = self.router(x).softmax(-1)
        mask = torch.zeros_like(probs).scatter_(-1, probs.topk(self.top_k, -1).indices, 1)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            mine = mask[..., e].bool()
            if mine.any():
                out[mine] += (probs * mask)[..., e][mine][:, None] * self.experts[f"expert {e}"](x[mine])
        return x + out


class OfSamples(MoE):
    """All tokens of a sample go to the same experts; `seen` says what the router reads."""

    def __init__(self, seen=lambda x, c: c, **how):
        super().__init__(experts=3, **how)
        self.seen = seen

    def forward(self, x, c):
        weight, index = self.router(self.seen(x, c)).softmax(-1).topk(self.top_k, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            sample, slot = torch.where(index == e)
            out.index_add_(0, sample, expert(x[sample]) * weight[sample, slot, None, None])
        return x + out


class DenseTwice(MoE):
    """All experts run on all rows; their sum stands there twice, and the first one is for nothing."""

    def route_to_experts(self, rows, index, weight):
        made = torch.stack([expert(rows) for expert in self.experts])
        each = torch.zeros(len(rows), EXPERTS).scatter(1, index, weight)
        out = torch.einsum("en,end->nd", each.T, made)
        out = torch.einsum("ne,end->nd", each, made)
        return out


class PartOfAList(MoE):
    """Expert choice among all experts but the last one of the list."""

    def forward(self, x):
        experts = self.experts[:-1]
        weight, index = self.router(x).softmax(-1)[..., : len(experts)].transpose(1, 2).topk(4, -1)
        hot = F.one_hot(index, x.shape[1]).to(x)
        rows = torch.einsum("becs,bsd->becd", hot, x)
        made = torch.stack([expert(rows[:, e]) for e, expert in enumerate(experts)], 1)
        return torch.einsum("becs,bec,becd->bsd", hot, weight, made)


class Threshold(MoE):
    """As many experts as are likely enough: no token has a fixed number."""

    def forward(self, x):
        rows = x.flatten(0, -2)
        probs = self.router(rows).softmax(-1)
        chosen = probs > self.limit(probs)
        out = torch.zeros_like(rows)
        seen = []
        for e, expert in enumerate(self.experts):
            token = chosen[:, e].nonzero()[:, 0]
            seen.append(len(token))
            out.index_add_(0, token, expert(rows[token]) * probs[token, e, None])
        return x + out.view_as(x)

    def limit(self, probs):
        return 1 / EXPERTS


class Packed(MoE):
    """Packed experts, one of whose parameters is flat: (width, experts * inner)."""

    def __init__(self, inner=20):
        super().__init__(expert=nn.Identity)
        self.inner = inner
        self.w1, self.w2 = (
            nn.Parameter(torch.randn(WIDTH, EXPERTS * inner)),
            nn.Parameter(torch.randn(EXPERTS, inner, WIDTH)),
        )

    def first(self, e):
        return self.w1[:, e * self.inner : (e + 1) * self.inner]

    def second(self, e):
        return self.w2[e]

    def route_to_experts(self, rows, index, weight):
        out = torch.zeros_like(rows)
        for e in range(EXPERTS):
            token, slot = torch.where(index == e)
            out.index_add_(0, token, F.gelu(rows[token] @ self.first(e)) @ self.second(e) * weight[token, slot, None])
        return out


class Viewed(Packed):
    """Packed experts as views of one flat parameter."""

    def first(self, e):
        return self.w1.view(WIDTH, EXPERTS, -1).unbind(1)[e]


class OnlyActive(nn.Module):
    """Grouped products from which branches of weight zero are left out."""

    def __init__(self, width=16):
        super().__init__()
        self.router = nn.Linear(width, EXPERTS)
        self.w1, self.w2 = (nn.Parameter((torch.randn(EXPERTS, width, width) / 4).bfloat16()) for _ in range(2))

    def forward(self, x):
        rows = x.flatten(0, 1)
        weight, index = self.router(rows).softmax(-1).topk(2, -1)
        flat, factor = index.flatten(), weight.where(weight > 0.3, 0).bfloat16().flatten()
        active = torch.where(factor != 0)[0]
        order = active[flat[active].argsort(stable=True)]
        ends = torch.bincount(flat[active], minlength=EXPERTS).cumsum(0).to(torch.int32)
        h = torch._grouped_mm(rows[order // 2].bfloat16(), self.w1, offs=ends)
        made = torch._grouped_mm(F.silu(h), self.w2, offs=ends)
        out = torch.zeros_like(rows).bfloat16()
        out.index_add_(0, order // 2, made * factor[order, None])
        return out.view_as(x).float()


class Labelled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, labels):
        return x + self.layer(x, labels)


class RouterOfSome(Loop):
    """The router sees samples with a label only; the others go to the last expert."""

    def forward(self, x, labels):
        rows, null = x.flatten(0, 1), (labels == NONE).repeat_interleave(x.shape[1])
        weight, index = rows.new_zeros(len(rows), self.top_k), rows.new_zeros(len(rows), self.top_k).long()
        if null.any():
            weight[null, 0] = 1.0
            index[null] = torch.tensor([EXPERTS - 1, 0])
        if (~null).any():
            at = torch.where(~null)[0]
            weight[at], index[at] = self.scores(rows[at]).topk(self.top_k, -1)
        return self.route_to_experts(rows, index, weight).view_as(x)

    def scores(self, rows):
        return self.router(F.normalize(rows, dim=-1)).softmax(-1)


class ChoiceOfSome(MoE):
    """Experts choose among the tokens of samples with a label; one expert is there for the others."""

    def __init__(self):
        super().__init__()
        self.null = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))

    def forward(self, x, labels):
        out, some = torch.zeros_like(x), labels != NONE
        if some.any():
            out[some] = self.chosen(x[some])
        if (~some).any():
            out[~some] = self.null(x[~some])
        else:
            out = out + 0 * self.null(torch.zeros(1, 1, WIDTH)).sum()
        return out

    def chosen(self, x):
        weight, index = self.router(x).softmax(-1).transpose(1, 2).topk(4, -1)
        hot = F.one_hot(index, x.shape[1]).to(x)
        rows = torch.einsum("becs,bsd->becd", hot, x)
        made = torch.stack([expert(rows[:, e]) for e, expert in enumerate(self.experts)], 1)
        return torch.einsum("becs,bec,becd->bsd", hot, weight, made)


STATEMENTS = [KeepsTheRouting, CountsUse, LogsAndChecks, Casts, Closure]
SPELLINGS = [ThroughNumpy, Split, TouchesIdleOnes, Unweighted, OntoTheRows, OfADict]
