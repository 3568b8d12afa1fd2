"""MoE layers that mean the same and dispatch in different ways, written as public models write them.

forward(x, seen, extra): rows that enter the experts, (B, N, width) or (T, width); what the router reads of the same
tokens, often x itself; a further row for each token, which some experts take.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dit import MoE, SwiGLU
from tests.capture.inline_layers import CatOutputs
from tests.variants.experts import BODIES, WithExtra
from tests.variants.routing import Router, Routing


@dataclass(frozen=True)
class Layering:
    """One MoE layer.

    dispatch: a name in DISPATCHES; body: one in experts.BODIES, of this hidden width and with bias or without
    shared: the hidden widths of its shared experts
    reads: what the router reads: "same", "timed" (beside the timestep embedding), "unmodulated", "both"
    extra: None, "time" or "context" (the mean over tokens), where the dispatch hands experts a further row
    flat: whether the layer is called with (T, width)
    beside: statements beside its dispatch, names in statements.STATEMENTS
    """

    dispatch: str = "sorted_numpy"
    routing: Routing = field(default_factory=Routing)
    body: str = "swiglu"
    hidden: int = 12
    bias: bool = False
    shared: tuple[int, ...] = ()
    reads: str = "same"
    extra: str | None = None
    flat: bool = False
    beside: tuple[str, ...] = ()


class Layer(nn.Module):
    """What all of them share, and what it means: `route`, `expert` and `shared_output` as plain functions."""

    def __init__(self, how: Layering, width: int) -> None:
        super().__init__()
        self.how, self.top_k, self.num_experts = how, how.routing.top_k, how.routing.experts
        self.gate = Router(how.routing, 2 * width if how.reads in ("timed", "both") else width)
        self.shared_experts = nn.ModuleList(SwiGLU(width, hidden) for hidden in how.shared)
        self.build(how, width)

    def build(self, how: Layering, width: int) -> None:
        def expert() -> nn.Module:
            body = BODIES[how.body](width, how.hidden, how.bias)
            return WithExtra(body, width) if how.extra else body

        self.experts = nn.ModuleList(expert() for _ in range(self.num_experts))

    def route(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(seen)

    def expert(self, number: int, x: Tensor, extra: Tensor) -> Tensor:
        return self.experts[number](x, extra) if self.how.extra else self.experts[number](x)

    def shared_output(self, x: Tensor) -> Tensor | None:
        outputs = [shared(x) for shared in self.shared_experts]
        return sum(outputs[1:], outputs[0]) if outputs else None

    def with_shared(self, y: Tensor, x: Tensor) -> Tensor:
        for shared in self.shared_experts:
            y = y + shared(x)
        return y


# Sorted segments


class SortedNumpy(Layer):
    """Sorted rows, segments from a NumPy array on the host, scatter_reduce_, in a method of its own."""

    moe_infer = MoE.moe_infer

    def forward(self, x, seen, extra):
        rows = x.reshape(-1, x.shape[-1])
        ids, weights = self.gate(seen)
        y = self.moe_infer(rows, ids.view(-1), weights.view(-1, 1)).view(x.shape)
        return self.with_shared(y, x)


class SortedList(Layer):
    """Sorted rows, segments from a Python list, index_add_, all in forward."""

    def forward(self, x, seen, extra):
        shape = x.shape
        rows = x.reshape(-1, shape[-1])
        ids, weights = self.gate(seen)
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=len(self.experts)).tolist()
        token, out, begin = order // self.top_k, torch.zeros_like(rows), 0
        for e, count in enumerate(counts):
            if count == 0:
                continue
            end = begin + count
            at = token[begin:end]
            out.index_add_(0, at, self.experts[e](rows[at]) * weights.reshape(-1)[order[begin:end], None])
            begin = end
        return self.with_shared(out.view(shape), x)


class SortedItem(Layer):
    """Sorted rows, segments read by .item() one by one, scatter_add_."""

    def forward(self, x, seen, extra):
        rows = x.flatten(0, -2)
        ids, weights = self.gate(seen)
        y = self.run(rows, ids.reshape(-1), weights.reshape(-1))
        return self.with_shared(y.view_as(x), x)

    @torch.no_grad()
    def run(self, x, ids, weights):
        y = torch.zeros_like(x)
        sorted_ids, order = torch.sort(ids)
        ends = torch.bincount(sorted_ids, minlength=self.num_experts).cumsum(0)
        for e in range(self.num_experts):
            start = 0 if e == 0 else ends[e - 1].item()
            end = ends[e].item()
            if end > start:
                rows = order[start:end] // self.top_k
                out = self.experts[e](x[rows]) * weights[order[start:end]].unsqueeze(-1)
                y.scatter_add_(0, rows.unsqueeze(-1).expand(-1, x.shape[1]), out)
        return y


class SortedExtra(Layer):
    """Sorted segments whose experts take a further row of each token (as in Diff-MoE)."""

    def forward(self, x, seen, extra):
        rows, more = x.reshape(-1, x.shape[-1]), extra.reshape(-1, extra.shape[-1])
        ids, weights = self.gate(seen)
        y = self.moe_infer(rows, more, ids.view(-1), weights.view(-1, 1))
        return self.with_shared(y.view(x.shape), x)

    @torch.no_grad()
    def moe_infer(self, x, extra, ids, weights):
        out = torch.zeros_like(x)
        order = ids.argsort()
        ends = ids.bincount(minlength=len(self.experts)).cumsum(0).tolist()
        token = order // self.top_k
        for i, end in enumerate(ends):
            start = 0 if i == 0 else ends[i - 1]
            if start == end:
                continue
            at = token[start:end]
            y = self.experts[i](x[at], extra[at]) * weights[order[start:end]]
            out.scatter_reduce_(0, at.view(-1, 1).repeat(1, x.shape[-1]), y, reduce="sum")
        return out


class SortedCat(Layer):
    """Outputs of the sorted rows joined, put back in order, weighted, summed (as DeepSeek-V2's inference)."""

    moe_infer = CatOutputs.moe_infer

    def forward(self, x, seen, extra):
        rows = x.view(-1, x.shape[-1])
        ids, weights = self.gate(seen)
        y = self.moe_infer(rows, ids.view(-1, self.top_k), weights.view(-1, self.top_k))
        return self.with_shared(y.view(*x.shape), x)


# Masks


class MaskHit(Layer):
    """A loop over the experts that were hit, found by one_hot and torch.where (as Mixtral's), index_add_."""

    def forward(self, hidden_states, seen, extra):
        shape = hidden_states.shape
        rows = hidden_states.reshape(-1, shape[-1])
        selected_experts, routing_weights = self.gate(seen)
        selected_experts, routing_weights = selected_experts.flatten(0, -2), routing_weights.flatten(0, -2)
        final = torch.zeros_like(rows)
        expert_mask = F.one_hot(selected_experts, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero():
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            current = self.experts[expert_idx](rows[None, top_x].reshape(-1, shape[-1]))
            final.index_add_(0, top_x, (current * routing_weights[top_x, idx, None]).to(final.dtype))
        return self.with_shared(final.reshape(shape), hidden_states)


class MaskAll(Layer):
    """A loop over all experts, each with the rows of its mask."""

    def forward(self, x, seen, extra):
        rows = x.reshape(-1, x.shape[-1])
        choice, gates = self.gate(seen)
        choice, gates = choice.view(-1, self.top_k), gates.view(-1, self.top_k)
        y = rows.new_zeros(rows.shape)
        for e, expert in enumerate(self.experts):
            at, slot = torch.where(choice == e)
            if at.numel() == 0:
                continue
            y = y.index_add(0, at, expert(rows[at]) * gates[at, slot].unsqueeze(-1))
        return self.with_shared(y.view(x.shape), x)


class MaskExtra(Layer):
    """A loop over masks whose experts take a further row of each token."""

    def forward(self, x, seen, extra):
        flat, more = x.reshape(-1, x.shape[-1]), extra.reshape(-1, extra.shape[-1])
        index, weight = self.gate(seen)
        index, weight = index.reshape(-1, self.top_k), weight.reshape(-1, self.top_k)
        out = torch.zeros_like(flat)
        mask = F.one_hot(index, len(self.experts)).permute(2, 0, 1)
        for e, expert in enumerate(self.experts):
            token, slot = mask[e].nonzero(as_tuple=True)
            out.index_add_(0, token, expert(flat[token], more[token]) * weight[token, slot][:, None])
        return self.with_shared(out.view(x.shape), x)


class BooleanMask(Layer):
    """Rows repeated k times, `y[ids == e] = expert(x[ids == e])`, weighted after the loop."""

    def forward(self, hidden_states, seen, extra):
        orig_shape, identity = hidden_states.shape, hidden_states
        topk_idx, topk_weight = self.gate(seen)
        topk_weight = topk_weight.view(-1, self.top_k)
        flat_topk_idx = topk_idx.view(-1)
        hidden_states = hidden_states.reshape(-1, orig_shape[-1]).repeat_interleave(self.top_k, dim=0)
        y = torch.empty_like(hidden_states)
        for i, expert in enumerate(self.experts):
            y[flat_topk_idx == i] = expert(hidden_states[flat_topk_idx == i])
        y = (y.view(*topk_weight.shape, -1) * topk_weight.unsqueeze(-1)).sum(dim=1)
        return self.with_shared(y.view(*orig_shape), identity)


# Packed experts


class Packed(Layer):
    """One parameter (experts, ...) per matrix: a SwiGLU without a module of its own."""

    def build(self, how: Layering, width: int) -> None:
        experts, hidden = self.num_experts, how.hidden
        self.w1 = nn.Parameter(torch.randn(experts, width, 2 * hidden) * width**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, width) * hidden**-0.5)

    def expert(self, number: int, x: Tensor, extra: Tensor) -> Tensor:
        gate, up = (x @ self.w1[number]).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.w2[number]


class PackedSplit(Packed):
    """Sorted rows split by host lengths, outputs joined, weighted, added back."""

    def forward(self, x, seen, extra):
        rows = x.reshape(-1, x.shape[-1])
        index, weight = self.gate(seen)
        flat = index.reshape(-1)
        order = torch.argsort(flat)
        lengths = torch.bincount(flat, minlength=self.num_experts).tolist()
        token = order // self.top_k
        outputs = []
        for e, part in enumerate(torch.split(rows[token], lengths, dim=0)):
            gate, up = torch.matmul(part, self.w1[e]).chunk(2, dim=-1)
            outputs.append(torch.matmul(F.silu(gate) * up, self.w2[e]))
        y = torch.cat(outputs, dim=0) * weight.reshape(-1)[order].unsqueeze(-1)
        return self.with_shared(torch.zeros_like(rows).index_add(0, token, y).view(x.shape), x)


class Grouped(Packed):
    """torch.nn.functional.grouped_mm over sorted rows, put back by the inverse permutation."""

    def forward(self, x, seen, extra):
        rows = x.reshape(-1, x.shape[-1])
        index, weight = self.gate(seen)
        flat = index.reshape(-1)
        order = flat.argsort()
        offsets = torch.cumsum(torch.bincount(flat, minlength=self.num_experts), 0, dtype=torch.int32)
        gate, up = F.grouped_mm(rows[order // self.top_k], self.w1, offs=offsets).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, self.w2, offs=offsets)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        y = (y[back].view(-1, self.top_k, x.shape[-1]) * weight.reshape(-1, self.top_k, 1)).sum(dim=1)
        return self.with_shared(y.view(x.shape), x)


class GroupedPrivate(Packed):
    """torch._grouped_mm, index_add_ of weighted rows."""

    def forward(self, x, seen, extra):
        rows = x.reshape(-1, x.shape[-1])
        index, weight = self.gate(seen)
        ids, order = index.reshape(-1).sort()
        token = order // self.top_k
        ends = F.one_hot(ids, self.num_experts).sum(0).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(rows[token], self.w1, offs=ends).chunk(2, dim=-1)
        y = torch._grouped_mm(F.silu(gate) * up, self.w2, offs=ends)
        out = torch.zeros_like(rows)
        out.index_add_(0, token, y * weight.reshape(-1)[order, None])
        return self.with_shared(out.view(x.shape), x)


class GatheredBmm(Packed):
    """A batched product with the weights of every branch."""

    def forward(self, x, seen, extra):
        rows = x.reshape(-1, x.shape[-1])
        index, weight = self.gate(seen)
        flat = index.reshape(-1)
        repeated = rows.repeat_interleave(self.top_k, dim=0)
        gate, up = torch.bmm(repeated.unsqueeze(1), self.w1[flat]).chunk(2, dim=-1)
        y = torch.bmm(F.silu(gate) * up, self.w2[flat]).squeeze(1)
        y = y.view(-1, self.top_k, rows.shape[-1]) * weight.reshape(-1, self.top_k, 1)
        return self.with_shared(y.sum(dim=1).view(x.shape), x)


class GatheredEinsum(Packed):
    """einsum over weights (T, k, in, out)."""

    def forward(self, x, seen, extra):
        rows = x.reshape(-1, x.shape[-1])
        index, weight = self.gate(seen)
        index, weight = index.reshape(-1, self.top_k), weight.reshape(-1, self.top_k)
        gate, up = torch.einsum("td,tkdh->tkh", rows, self.w1[index]).chunk(2, -1)
        y = torch.einsum("tkh,tkhd->tkd", F.silu(gate) * up, self.w2[index])
        return self.with_shared(torch.einsum("tk,tkd->td", weight, y).view(x.shape), x)


# Dense


class DenseStack(Layer):
    """All experts on all tokens, stacked, weighted by a sparse gate."""

    def forward(self, x, seen, extra):
        rows = x.reshape(-1, x.shape[-1])
        index, weight = self.gate(seen)
        index, weight = index.reshape(-1, self.top_k), weight.reshape(-1, self.top_k)
        gates = weight.new_zeros(len(rows), self.num_experts).scatter(1, index, weight)
        outs = torch.stack([expert(rows) for expert in self.experts], dim=1)
        return self.with_shared(torch.einsum("te,ted->td", gates, outs).view(x.shape), x)


class DenseLoop(Layer):
    """A loop over all experts on all tokens, as the input comes."""

    def forward(self, x, seen, extra):
        index, weight = self.gate(seen)
        gates = torch.zeros(*index.shape[:-1], self.num_experts, dtype=weight.dtype, device=weight.device)
        gates = gates.scatter(-1, index, weight)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + gates[..., e : e + 1] * expert(x)
        return self.with_shared(out, x)


class DensePacked(Packed):
    """Packed weights and einsum over all experts."""

    def forward(self, x, seen, extra):
        rows = x.reshape(-1, x.shape[-1])
        index, weight = self.gate(seen)
        gates = rows.new_zeros(len(rows), self.num_experts)
        gates.scatter_(1, index.reshape(-1, self.top_k), weight.reshape(-1, self.top_k))
        gate, up = torch.einsum("td,edh->teh", rows, self.w1).chunk(2, dim=-1)
        y = torch.einsum("teh,ehd->ted", F.silu(gate) * up, self.w2)
        return self.with_shared((y * gates.unsqueeze(-1)).sum(dim=1).view(x.shape), x)


# What no idiom reads: found by running


class HostSet(Layer):
    """A loop over the experts that were hit, as a set on the host."""

    def forward(self, x, seen, extra):
        rows = x.reshape(-1, x.shape[-1])
        index, weight = (each.reshape(-1, self.top_k) for each in self.gate(seen))
        out = rows.new_zeros(rows.shape)
        for e in sorted(set(index.flatten().tolist())):
            token, slot = torch.where(index == e)
            out[token] += self.experts[e](rows[token]) * weight[token, slot].unsqueeze(1)
        return self.with_shared(out.view(x.shape), x)


class PutBack(Layer):
    """Rows sorted, run and put back by three methods, by gathers."""

    def forward(self, x, seen, extra):
        index, weight = (each.reshape(-1, self.top_k) for each in self.gate(seen))
        order = index.flatten().argsort(stable=True)
        made = self.run(x.reshape(-1, x.shape[-1])[order // self.top_k], index)
        return self.with_shared(self.joined(made, order, weight).view(x.shape), x)

    def run(self, rows, index):
        parts = rows.split(torch.bincount(index.flatten(), minlength=self.num_experts).tolist())
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])

    def joined(self, made, order, weight):
        return (made[order.argsort()].unflatten(0, weight.shape) * weight.unsqueeze(-1)).sum(1)


class Beside(Layer):
    """A mask loop in `try`, beside statements that do not touch its result. `kept` says which of them there are."""

    def forward(self, x, seen, extra):
        rows = x.reshape(-1, x.shape[-1])
        index, weight = (each.reshape(-1, self.top_k) for each in self.gate(seen))
        kept, out = self.how.hidden // 8 + self.how.routing.experts, torch.zeros_like(rows)
        if kept % 2:
            self.last = index.detach()
        if kept % 3 == 0 and not rows.isfinite().all():
            logging.getLogger(__name__).warning("not finite")
        seen_by = []
        try:
            for e, expert in enumerate(self.experts):
                token, slot = torch.where(index == e)
                seen_by.append(token)
                out.index_add_(0, token, expert(rows[token]) * weight[token, slot, None])
        finally:
            self.calls = getattr(self, "calls", 0) + 1
        return self.with_shared(out.view(x.shape), x)


class IdleOnes(Layer):
    """Experts without tokens run on a row of zeros, and count for nothing."""

    def forward(self, x, seen, extra):
        rows = x.reshape(-1, x.shape[-1])
        index, weight = (each.reshape(-1, self.top_k) for each in self.gate(seen))
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            if len(token):
                out.index_add_(0, token, expert(rows[token]) * weight[token, slot, None])
            else:
                out = out + 0 * expert(rows.new_zeros(1, rows.shape[1])).sum()
        return self.with_shared(out.view(x.shape), x)


BY_RUNNING: dict[str, type[Layer]] = {
    "host_set": HostSet,
    "put_back": PutBack,
    "beside": Beside,
    "idle_ones": IdleOnes,
}
WITH_MODULES: dict[str, type[Layer]] = {
    "sorted_numpy": SortedNumpy,
    "sorted_list": SortedList,
    "sorted_item": SortedItem,
    "sorted_cat": SortedCat,
    "mask_hit": MaskHit,
    "mask_all": MaskAll,
    "boolean_mask": BooleanMask,
    "dense_stack": DenseStack,
    "dense_loop": DenseLoop,
}
WITH_EXTRAS: dict[str, type[Layer]] = {"sorted_extra": SortedExtra, "mask_extra": MaskExtra}
GROUPED: dict[str, type[Layer]] = {"grouped": Grouped, "grouped_private": GroupedPrivate}
PACKED: dict[str, type[Layer]] = {
    "packed_split": PackedSplit,
    **GROUPED,
    "gathered_bmm": GatheredBmm,
    "gathered_einsum": GatheredEinsum,
    "dense_packed": DensePacked,
}
DISPATCHES = WITH_MODULES | WITH_EXTRAS | PACKED | BY_RUNNING
