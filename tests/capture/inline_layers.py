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


MASK_LOOPS = (OneHotHit, AllExperts, BooleanMask, SlotBySlot, MaskedSum, TopOne, WeightedAfter, OwnModule)
