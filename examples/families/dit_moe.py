"""DiT-MoE: experts in every block, two of eight with raw softmax weights; shared experts are one wide SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples.dit import Block, DiffusionTransformer, Sizes, SwiGLU
from examples.families.common import Family


@dataclass(frozen=True)
class DiTMoESizes(Sizes):
    """Routed experts have the inner width mlp_ratio * D, and each of the `shared` experts D."""

    experts: int = 8
    top_k: int = 2
    shared: int = 2


class DiTMoELayer(nn.Module):
    def __init__(self, sizes: DiTMoESizes) -> None:
        super().__init__()
        self.top_k = sizes.top_k
        self.router = nn.Linear(sizes.width, sizes.experts, bias=False)
        hidden = int(sizes.mlp_ratio * sizes.width)
        self.experts = nn.ModuleList(SwiGLU(sizes.width, hidden) for _ in range(sizes.experts))
        self.shared = SwiGLU(sizes.width, sizes.shared * sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        shape, rows = x.shape, x.reshape(-1, x.shape[-1])
        weights, ids = self.router(rows).softmax(dim=-1).topk(self.top_k, dim=-1, sorted=False)
        routed = self.run_segments(rows, ids.view(-1), weights.view(-1, 1))
        return routed.view(shape) + self.shared(x)

    @torch.no_grad()
    def run_segments(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Gather the branches (T * k) expert by expert; scatter the results back and sum them."""
        order = ids.argsort()
        counts = ids.bincount(minlength=len(self.experts)).tolist()
        out, start = torch.zeros_like(rows), 0
        for e, count in enumerate(counts):
            if count == 0:
                continue
            branches = order[start : start + count]
            token = branches // self.top_k
            result = self.experts[e](rows[token]).mul_(weights[branches])
            out.scatter_add_(0, token.unsqueeze(-1).expand(-1, rows.shape[-1]), result)
            start += count
        return out


class DiTMoE(DiffusionTransformer):
    def __init__(self, sizes: DiTMoESizes) -> None:
        super().__init__(sizes, lambda index: Block(sizes.width, sizes.heads, lambda: DiTMoELayer(sizes)))


FAMILY = Family(
    DiTMoE,
    published={
        "DiT-MoE-S": DiTMoESizes(width=384, depth=12, heads=6),
        "DiT-MoE-B": DiTMoESizes(width=768, depth=12, heads=12),
        "DiT-MoE-XL": DiTMoESizes(width=1152, depth=28, heads=16),
    },
    reduced=DiTMoESizes(width=32, depth=3, heads=4, side=8, classes=10, experts=6, mlp_ratio=2.0),
)
