"""MoE layers whose router and dispatch stand together in `forward`, written as public models write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture.layers import EXPERTS, WIDTH, MoE, swiglu


class OneHotHit(MoE):
    """Mixtral's block: one_hot permuted, the experts hit, torch.where, index_add_."""

    def forward(self, hidden_states):
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        hidden_states = hidden_states.view(-1, hidden_dim)
        router_logits = self.router(hidden_states)
        routing_weights = F.softmax(router_logits, dim=1, dtype=torch.float)
        routing_weights, selected_experts = torch.topk(routing_weights, self.top_k, dim=-1)
        routing_weights /= routing_weights.sum(dim=-1, keepdim=True)
        routing_weights = routing_weights.to(hidden_states.dtype)
        final_hidden_states = torch.zeros(
            (batch_size * sequence_length, hidden_dim), dtype=hidden_states.dtype, device=hidden_states.device
        )
        expert_mask = F.one_hot(selected_experts, num_classes=len(self.experts)).permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
            current_hidden_states = expert_layer(current_state) * routing_weights[top_x, idx, None]
            final_hidden_states.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
        return final_hidden_states.reshape(batch_size, sequence_length, hidden_dim)


class AllExperts(MoE):
    """The static variant: a loop over every expert; the shared expert is added afterwards."""

    def __init__(self, top_k: int = 2, expert=swiglu, experts: int = EXPERTS) -> None:
        super().__init__(top_k, expert, experts)
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        scores = self.router(x).sigmoid()
        choice = scores.topk(self.top_k, dim=-1)[1]
        gates = scores.gather(1, choice)
        y = x.new_zeros(x.shape)
        for e, expert in enumerate(self.experts):
            rows, slots = torch.where(choice == e)
            if rows.numel() == 0:
                continue
            y = y.index_add(0, rows, expert(x[rows]) * gates[rows, slots].unsqueeze(-1))
        return (y + self.shared(x)).view(shape)


class BooleanMask(MoE):
    """DeepSeek's training path: rows repeated k times, `y[ids == e] = expert(x[ids == e])`, weighted after."""

    def forward(self, hidden_states):
        identity, orig_shape = hidden_states, hidden_states.shape
        topk_weight, topk_idx = self.router(hidden_states).softmax(-1).topk(self.top_k, dim=-1)
        topk_weight = topk_weight.view(-1, self.top_k)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        flat_topk_idx = topk_idx.view(-1)
        hidden_states = hidden_states.repeat_interleave(self.top_k, dim=0)
        y = torch.empty_like(hidden_states, dtype=hidden_states.dtype)
        for i, expert in enumerate(self.experts):
            y[flat_topk_idx == i] = expert(hidden_states[flat_topk_idx == i])
        y = (y.view(*topk_weight.shape, -1) * topk_weight.unsqueeze(-1)).sum(dim=1)
        return y.view(*orig_shape) + identity


class SlotBySlot(MoE):
    """Two loops, boolean masks, `+=` on the rows; weights kept for all experts."""

    def forward(self, x):
        flat = x.flatten(0, 1)
        probabilities = self.router(flat).softmax(-1)
        _, ids = probabilities.topk(self.top_k)
        out = torch.zeros_like(flat)
        for slot in range(self.top_k):
            for e in range(len(self.experts)):
                chosen = ids[:, slot] == e
                if chosen.any():
                    out[chosen] += probabilities[chosen, e, None] * self.experts[e](flat[chosen])
        return x + out.view_as(x)


class MaskedSum(MoE):
    """A gate per expert, summed over the slots under the mask; rows found by nonzero."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        gate, pick = self.router(rows).softmax(dim=-1).topk(self.top_k, dim=-1)
        total = torch.zeros_like(rows)
        for e in range(len(self.experts)):
            hit = pick == e
            token = hit.any(dim=-1).nonzero(as_tuple=True)[0]
            scale = (gate * hit).sum(dim=-1)[token]
            total[token] = total[token] + self.experts[e](rows[token]) * scale[:, None]
        return total.reshape(x.shape)


class TopOne(MoE):
    """One branch a token: `out[mask] = weight[mask] * expert(x[mask])`, 2-D and 3-D inputs alike."""

    def __init__(self, top_k: int = 1, expert=swiglu, experts: int = EXPERTS) -> None:
        super().__init__(1, expert, experts)

    def forward(self, x):
        tokens = x.reshape(-1, x.size(-1))
        weight, best = self.router(tokens).softmax(-1).max(dim=-1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            mask = best.eq(number)
            out[mask] = weight[mask].unsqueeze(1) * expert(tokens[mask])
        return out.reshape(x.shape)


class WeightedAfter(MoE):
    """One branch a token, weighted after the loop; the router in float32."""

    def __init__(self, top_k: int = 1, expert=swiglu, experts: int = EXPERTS) -> None:
        super().__init__(1, expert, experts)

    def forward(self, x):
        rows = x.view(-1, WIDTH)
        with torch.no_grad():
            logits = F.linear(rows.float(), self.router.weight.float())
            prob = logits.softmax(-1)
            w, idx = prob.max(-1)
            y = torch.empty_like(rows)
            for e in range(len(self.experts)):
                y[idx == e] = self.experts[e](rows[idx == e])
            y = y * w.to(y.dtype)[:, None]
        return y.view(x.shape) + x


class WithTimestep(MoE):
    """Experts that take a further row per token; training code beside, in an `else`."""

    def __init__(self, top_k: int = 2, expert=None, experts: int = EXPERTS) -> None:
        super().__init__(top_k, expert or Modulated, experts)

    def forward(self, x, time):
        b, n, d = x.shape
        flat, t = x.reshape(b * n, d), time[:, None].expand(b, n, d).reshape(b * n, d)
        weight, index = self.router(flat).softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(flat)
        if self.training:
            for expert in self.experts:
                out = out + expert(flat, t)
        else:
            mask = F.one_hot(index, len(self.experts)).permute(2, 0, 1)
            for e, expert in enumerate(self.experts):
                token, slot = mask[e].nonzero(as_tuple=True)
                out.index_add_(0, token, expert(flat[token], t[token]) * weight[token, slot][:, None])
        return out.view(b, n, d)


class Modulated(nn.Module):
    """An expert of rows and a conditioning row each."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x + self.shift(t))))


class Dispatch(nn.Module):
    """Handed rows, ids and weights, 3-D or 2-D: the experts of a list as a module of their own."""

    def __init__(self, experts: nn.ModuleList) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states, top_k_index, top_k_weights):
        hidden_states = hidden_states.reshape(-1, WIDTH)
        out = torch.zeros_like(hidden_states)
        mask = F.one_hot(top_k_index, num_classes=len(self.experts)).permute(2, 1, 0)
        for e in mask.sum(dim=(1, 2)).nonzero():
            slot, token = torch.where(mask[e.item()])
            out.index_add_(0, token, self.experts[e.item()](hidden_states[token]) * top_k_weights[token, slot, None])
        return out


class OwnModule(MoE):
    def __init__(self, top_k: int = 2, expert=swiglu, experts: int = EXPERTS) -> None:
        super().__init__(top_k, expert, experts)
        self.inner = Dispatch(self.experts)

    def route_to_experts(self, rows, index, weight):
        return self.inner(rows, index, weight)


class Dropping(MoE):
    """Branches of small weight are given to no expert: their id is one past the last."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        weight, index = self.router(rows).softmax(-1).topk(self.top_k, dim=-1)
        index = torch.where(weight > weight.mean(), index, len(self.experts))
        out = torch.zeros_like(rows)
        mask = F.one_hot(index, num_classes=len(self.experts) + 1).permute(2, 1, 0)
        for e in range(len(self.experts)):
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.experts[e](rows[token]) * weight[token, slot, None])
        return out.view(x.shape)


MASK_LOOPS = (OneHotHit, AllExperts, BooleanMask, SlotBySlot, MaskedSum, TopOne, WeightedAfter, Dropping, OwnModule)


class SortedInline(MoE):
    """Sorted segments in forward itself, the counts read with numpy, a shared expert's output added."""

    def __init__(self, top_k: int = 2, expert=swiglu, experts: int = EXPERTS) -> None:
        super().__init__(top_k, expert, experts)
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        identity, shape = x, x.shape
        x = x.view(-1, shape[-1])
        scores = F.softmax(self.router(x), dim=-1)
        weight, index = torch.topk(scores, self.top_k, dim=-1, sorted=False)
        flat_index, flat_weight = index.view(-1), weight.view(-1, 1)
        cache = torch.zeros_like(x)
        order = flat_index.argsort()
        ends = flat_index.bincount().cpu().numpy().cumsum(0)
        token = order // self.top_k
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            if start == end:
                continue
            rows = token[start:end]
            out = self.experts[e](x[rows])
            out.mul_(flat_weight[order[start:end]])
            cache.scatter_reduce_(0, rows.view(-1, 1).repeat(1, x.shape[-1]), out, reduce="sum")
        return cache.view(*shape) + self.shared(identity)


class SortedWithExtras(MoE):
    """Sorted segments with a timestep row and a global context row for each token, as in Diff-MoE."""

    def __init__(self, top_k: int = 2, expert=None, experts: int = EXPERTS) -> None:
        super().__init__(top_k, expert or Conditioned, experts)

    def forward(self, x, time):
        b, n, d = x.shape
        rows = x.reshape(-1, d)
        t = time.repeat_interleave(n, dim=0)
        g = x.mean(dim=1, keepdim=True).expand(-1, n, -1).reshape(-1, d)
        gate, choice = self.router(rows).softmax(-1).topk(self.top_k, dim=-1)
        y = self.moe_infer(rows, t, g, choice.view(-1), gate.view(-1, 1))
        return y.view(b, n, d)

    @torch.no_grad()
    def moe_infer(self, x, t, g, ids, weights):
        out = torch.zeros_like(x)
        order = ids.argsort()
        ends = ids.bincount(minlength=len(self.experts)).cumsum(0).tolist()
        token = order // self.top_k
        for i, end in enumerate(ends):
            start = 0 if i == 0 else ends[i - 1]
            if start == end:
                continue
            at = token[start:end]
            y = self.experts[i](x[at], t[at], g[at]) * weights[order[start:end]]
            out.scatter_reduce_(0, at.view(-1, 1).repeat(1, x.shape[-1]), y, reduce="sum")
        return out


class Conditioned(nn.Module):
    """An expert of rows, a timestep row and a context row each."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.mix, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, t: Tensor, g: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x + self.shift(t)) + self.mix(g)))


class ExtrasInline(SortedWithExtras):
    """The same in forward itself."""

    def forward(self, x, time):
        b, n, d = x.shape
        rows, t = x.reshape(-1, d), time.repeat_interleave(n, dim=0)
        g = x.mean(dim=1, keepdim=True).expand(-1, n, -1).reshape(-1, d)
        gate, choice = self.router(rows).softmax(-1).topk(self.top_k, dim=-1)
        flat = choice.reshape(-1)
        values, order = torch.sort(flat)
        sizes = torch.bincount(values, minlength=len(self.experts)).tolist()
        out, begin = torch.zeros_like(rows), 0
        for expert, size in zip(self.experts, sizes, strict=True):
            branch = order[begin : begin + size]
            at = branch // self.top_k
            begin = begin + size
            y = expert(rows[at], t[at], g[at])
            out.index_add_(0, at, y * gate.reshape(-1)[branch].unsqueeze(-1))
        return out.reshape(b, n, d)


class CatOutputs(MoE):
    """DeepSeek-V2's inference: outputs of the sorted rows joined, put back in order, weighted, summed."""

    def forward(self, hidden_states):
        orig_shape = hidden_states.shape
        topk_weight, topk_idx = self.router(hidden_states.view(-1, WIDTH)).softmax(-1).topk(self.top_k)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        return self.moe_infer(hidden_states, topk_idx, topk_weight).view(*orig_shape)

    @torch.no_grad()
    def moe_infer(self, x, topk_ids, topk_weight):
        cnts = topk_ids.new_zeros((topk_ids.shape[0], len(self.experts)))
        cnts.scatter_(1, topk_ids, 1)
        tokens_per_expert = cnts.sum(dim=0)
        idxs = topk_ids.view(-1).argsort()
        sorted_tokens = x[idxs // topk_ids.shape[1]]
        tokens_per_expert = tokens_per_expert.cpu().numpy()
        outputs = []
        start_idx = 0
        for i, num_tokens in enumerate(tokens_per_expert):
            end_idx = start_idx + num_tokens
            if num_tokens == 0:
                continue
            expert = self.experts[i]
            tokens_for_this_expert = sorted_tokens[start_idx:end_idx]
            expert_out = expert(tokens_for_this_expert)
            outputs.append(expert_out)
            start_idx = end_idx
        outs = torch.cat(outputs, dim=0) if len(outputs) else sorted_tokens.new_empty(0)
        new_x = torch.empty_like(outs)
        new_x[idxs] = outs
        final_out = (
            new_x.view(*topk_ids.shape, -1)
            .type(topk_weight.dtype)
            .mul_(topk_weight.unsqueeze(dim=-1))
            .sum(dim=1)
            .type(new_x.dtype)
        )
        return final_out


class SplitComprehension(MoE):
    """Segments by split, experts in a comprehension, put back by the inverse permutation."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        weight, index = self.router(rows).softmax(-1).topk(self.top_k, dim=-1)
        flat = index.flatten()
        order = flat.argsort(stable=True)
        sizes = flat.bincount(minlength=len(self.experts)).tolist()
        parts = rows.repeat_interleave(self.top_k, dim=0)[order].split(sizes)
        outs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        y = torch.zeros_like(outs).index_copy(0, order, outs)
        return (y.view(*weight.shape, -1) * weight[..., None]).sum(dim=-2).view(x.shape)


SORTED = (SortedInline, CatOutputs, SplitComprehension)


class Packed(nn.Module):
    """One parameter (experts, ...) per matrix; SwiGLU experts without a module of their own."""

    def __init__(self, top_k: int = 2, experts: int = EXPERTS, hidden: int = 16) -> None:
        super().__init__()
        self.top_k, self.num_experts = top_k, experts
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.act = nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, WIDTH, 2 * hidden) * WIDTH**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, WIDTH) * hidden**-0.5)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).float().softmax(-1)
        weight, index = scores.topk(self.top_k, dim=-1)
        return (weight / weight.sum(-1, keepdim=True)).to(x.dtype), index


class PackedSplit(Packed):
    """Sorted rows split by host lengths, outputs joined, weighted, added back."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        weight, index = self.route(rows)
        flat = index.view(-1)
        order = torch.argsort(flat)
        lengths = torch.bincount(flat, minlength=self.num_experts).tolist()
        token = order // self.top_k
        outputs = []
        for e, part in enumerate(torch.split(rows[token], lengths, dim=0)):
            gate, up = torch.matmul(part, self.gate_up_proj[e]).chunk(2, dim=-1)
            outputs.append(torch.matmul(F.silu(gate) * up, self.down_proj[e]))
        y = torch.cat(outputs, dim=0) * weight.view(-1)[order].unsqueeze(-1)
        return torch.zeros_like(rows).index_add(0, token, y).view(x.shape)


class PackedMask(Packed):
    """transformers' experts: one-hot mask, F.linear on slices, an activation module of the layer."""

    def __init__(self, top_k: int = 2, experts: int = EXPERTS, hidden: int = 16) -> None:
        super().__init__(top_k, experts, hidden)
        self.gate_up_proj = nn.Parameter(self.gate_up_proj.detach().transpose(1, 2).contiguous())
        self.down_proj = nn.Parameter(self.down_proj.detach().transpose(1, 2).contiguous())
        self.bias = nn.Parameter(torch.randn(experts, WIDTH))

    def forward(self, x):
        hidden_states = x.reshape(-1, WIDTH)
        top_k_weights, top_k_index = self.route(hidden_states)
        final = torch.zeros_like(hidden_states)
        with torch.no_grad():
            expert_mask = F.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
            hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in hit:
            expert_idx = expert_idx[0]
            if expert_idx == self.num_experts:
                continue
            top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
            current_state = hidden_states[token_idx]
            gate, up = F.linear(current_state, self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
            current = self.act(gate) * up
            current = F.linear(current, self.down_proj[expert_idx], self.bias[expert_idx])
            current = current * top_k_weights[token_idx, top_k_pos, None]
            final.index_add_(0, token_idx, current.to(final.dtype))
        return final.reshape(x.shape)


class GroupedMatmul(Packed):
    """torch._grouped_mm over sorted rows, put back by the inverse permutation."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        weight, index = self.route(rows)
        flat = index.reshape(-1)
        order = flat.argsort()
        offsets = torch.cumsum(torch.bincount(flat, minlength=self.num_experts), 0, dtype=torch.int32)
        h = torch._grouped_mm(rows[order // self.top_k], self.gate_up_proj, offs=offsets)
        gate, up = h.chunk(2, dim=-1)
        y = torch._grouped_mm(self.act(gate) * up, self.down_proj, offs=offsets)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        y = (y[back].view(-1, self.top_k, WIDTH) * weight.unsqueeze(-1)).sum(dim=1)
        return y.reshape(x.shape)


class GroupedFunctional(Packed):
    """F.grouped_mm with transposed weights and biases picked by the sorted ids; index_add_ of weighted rows."""

    def __init__(self, top_k: int = 2, experts: int = EXPERTS, hidden: int = 16) -> None:
        super().__init__(top_k, experts, hidden)
        self.down_proj = nn.Parameter(self.down_proj.detach().transpose(1, 2).contiguous())
        self.bias = nn.Parameter(torch.randn(experts, WIDTH))

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        weight, index = self.route(rows)
        ids, order = index.view(-1).sort()
        token = order // self.top_k
        ends = F.one_hot(ids, self.num_experts).sum(0).cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(rows[token], self.gate_up_proj, offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(-2, -1), offs=ends) + self.bias[ids]
        out = torch.zeros_like(rows)
        out.index_add_(0, token, y * weight.view(-1)[order, None])
        return out.view(x.shape)


class GatheredBmm(Packed):
    """Batched matmul over the weights of every branch."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        weight, index = self.route(rows)
        flat = index.reshape(-1)
        repeated = rows.repeat_interleave(self.top_k, dim=0)
        gate, up = torch.bmm(repeated.unsqueeze(1), self.gate_up_proj[flat]).chunk(2, dim=-1)
        y = torch.bmm(F.silu(gate) * up, self.down_proj[flat]).squeeze(1)
        y = y.view(-1, self.top_k, WIDTH) * weight.unsqueeze(-1)
        return y.sum(dim=1).view(x.shape)


class GatheredEinsum(Packed):
    """einsum over weights (T, k, in, out)."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        weight, index = self.route(rows)
        w1, w2 = self.gate_up_proj[index], self.down_proj[index]
        gate, up = torch.einsum("td,tkdh->tkh", rows, w1).chunk(2, -1)
        y = torch.einsum("tkh,tkhd->tkd", F.silu(gate) * up, w2)
        return torch.einsum("tk,tkd->td", weight, y).view(x.shape)


class GatheredMatmul(Packed):
    """`@` with broadcast rows (T, 1, 1, D)."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        weight, index = self.route(rows)
        gate, up = (rows[:, None, None, :] @ self.gate_up_proj[index]).chunk(2, dim=-1)
        y = ((self.act(gate) * up) @ self.down_proj[index]).squeeze(-2)
        return (y * weight[..., None]).sum(-2).view(x.shape)


PACKED = (PackedSplit, PackedMask, GroupedMatmul, GroupedFunctional, GatheredBmm, GatheredEinsum, GatheredMatmul)


class DenseStack(MoE):
    """All experts on all tokens, stacked, weighted by a sparse gate."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        scores = self.router(rows).softmax(-1)
        weight, index = scores.topk(self.top_k, dim=-1)
        gates = torch.zeros_like(scores).scatter(1, index, weight)
        outs = torch.stack([expert(rows) for expert in self.experts], dim=1)
        return torch.einsum("te,ted->td", gates, outs).view(x.shape)


class DenseLoop(MoE):
    """A loop over all experts on all tokens, 3-D; the gate normalized after it was made sparse."""

    def forward(self, x):
        scores = self.router(x).sigmoid()
        _, index = scores.topk(self.top_k, dim=-1)
        mask = torch.zeros_like(scores).scatter_(-1, index, 1.0)
        gates = scores * mask
        gates = gates / gates.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + gates[..., e : e + 1] * expert(x)
        return out


class DenseSum(MoE):
    """The same as a sum of a generator, the gate from a one-hot."""

    def forward(self, x):
        rows = x.flatten(0, 1)
        weight, index = self.router(rows).softmax(-1).topk(self.top_k, dim=-1)
        gates = (F.one_hot(index, len(self.experts)).to(weight.dtype) * weight.unsqueeze(-1)).sum(dim=1)
        y = sum(gates[:, e, None] * self.experts[e](rows) for e in range(len(self.experts)))
        return y.view_as(x)


class DensePacked(Packed):
    """Packed weights and einsum over all experts."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        weight, index = self.route(rows)
        gates = rows.new_zeros(len(rows), self.num_experts)
        gates.scatter_(1, index, weight)
        gate, up = torch.einsum("td,edh->teh", rows, self.gate_up_proj).chunk(2, dim=-1)
        y = torch.einsum("teh,ehd->ted", F.silu(gate) * up, self.down_proj)
        return (y * gates.unsqueeze(-1)).sum(dim=1).view(x.shape)


DENSE = (DenseStack, DenseLoop, DenseSum, DensePacked)
