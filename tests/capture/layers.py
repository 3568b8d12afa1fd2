"""MoE layers that mean the same and write their dispatch in different ways, as public models do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.dit import SwiGLU

WIDTH, EXPERTS = 12, 5


def swiglu() -> nn.Module:
    return SwiGLU(WIDTH, 20)


def swiglu_with_bias() -> nn.Module:
    return SwiGLU(WIDTH, 20, bias=True)


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))


class MoE(nn.Module):
    """A router, `experts` made by `expert`, and a residual. Subclasses dispatch in `route_to_experts`."""

    def __init__(self, top_k: int = 2, expert=swiglu, experts: int = EXPERTS) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight, index = self.router(rows).softmax(-1).topk(self.top_k, dim=-1)
        return x + self.route_to_experts(rows, index, weight.to(x.dtype)).reshape(x.shape)

    def route_to_experts(self, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError


class NumpyEnds(MoE):
    """cumsum in numpy, in-place weighting, scatter_reduce_."""

    def route_to_experts(self, rows, index, weight):
        return self.moe_infer(rows, index.view(-1), weight.view(-1, 1))

    @torch.no_grad()
    def moe_infer(self, x, flat_expert_indices, flat_expert_weights):
        expert_cache = torch.zeros_like(x)
        idxs = flat_expert_indices.argsort()
        tokens_per_expert = flat_expert_indices.bincount().cpu().numpy().cumsum(0)
        token_idxs = idxs // self.top_k
        for i, end_idx in enumerate(tokens_per_expert):
            start_idx = 0 if i == 0 else tokens_per_expert[i - 1]
            if start_idx == end_idx:
                continue
            expert = self.experts[i]
            exp_token_idx = token_idxs[start_idx:end_idx]
            expert_out = expert(x[exp_token_idx])
            expert_out.mul_(flat_expert_weights[idxs[start_idx:end_idx]])
            expert_cache = expert_cache.to(expert_out.dtype)
            expert_cache.scatter_reduce_(
                0, exp_token_idx.view(-1, 1).repeat(1, x.shape[-1]), expert_out, reduce="sum"
            )
        return expert_cache


class RunningStart(MoE):
    """Counts as a Python list, other names and order of arguments, (T, k) ids and weights, index_add_."""

    def route_to_experts(self, rows, index, weight):
        return self.dispatch(weights=weight, tokens=rows, choice=index)

    @torch.inference_mode()
    def dispatch(self, choice, weights, tokens):
        choice = choice.flatten()
        by_expert = torch.argsort(choice, stable=True)
        counts = torch.bincount(choice, minlength=len(self.experts)).tolist()
        result, begin = tokens.new_zeros(tokens.shape), 0
        for number in range(len(self.experts)):
            finish = begin + counts[number]
            if finish > begin:
                branch = by_expert[begin:finish]
                row = branch // self.top_k
                output = self.experts[number](tokens.index_select(0, row))
                result.index_add_(0, row, output * weights.reshape(-1)[branch].unsqueeze(-1))
            begin = finish
        return result


class SortedFirst(MoE):
    """Rows and weights sorted before the loop, experts in the loop's head, scatter_add, weights (T * k,)."""

    def route_to_experts(self, rows, index, weight):
        return self.combine(index.reshape(-1), rows, weight.reshape(-1))

    def combine(self, e, h, w):
        with torch.no_grad():
            _, order = e.sort()
            token = torch.div(order, self.top_k, rounding_mode="floor")
            sorted_h, sorted_w = h[token], w[order][:, None]
            stops = torch.cumsum(torch.bincount(e, minlength=len(self.experts)), 0).cpu().tolist()
            out = torch.zeros(h.shape, dtype=h.dtype, device=h.device)
            for expert, start, stop in zip(self.experts, [0, *stops[:-1]], stops, strict=True):
                y = torch.mul(sorted_w[start:stop], expert(sorted_h[start:stop]))
                out = out.scatter_add(0, token[start:stop, None].expand(-1, h.shape[1]), y)
        return out


class SplitSegments(MoE):
    """The order split at the host's counts, `+=` on the rows (a token meets an expert once)."""

    def route_to_experts(self, rows, index, weight):
        return self.run_experts(rows, weight.view(-1, 1), index.view(-1))

    @torch.no_grad()
    def run_experts(self, x, gates, expert_of_branch):
        y = torch.zeros_like(x)
        order = torch.argsort(expert_of_branch)
        sizes = expert_of_branch.bincount(minlength=len(self.experts)).tolist()
        for number, branches in enumerate(torch.split(order, sizes)):
            rows = branches // self.top_k
            y[rows] += gates[branches] * self.experts[number](x[rows])
        return y


SPELLINGS = (NumpyEnds, RunningStart, SortedFirst, SplitSegments)
EXPERT_KINDS = (swiglu, swiglu_with_bias, sequential)


class Block(nn.Module):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def stack(*layers: nn.Module) -> nn.Module:
    """The layers, each in a block, in eval mode."""
    return nn.Sequential(*(Block(layer) for layer in layers)).eval()


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    """(2, 10, WIDTH) from a fixed seed."""
    return torch.randn(2, 10, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
