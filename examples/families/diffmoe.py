"""DiffMoE: experts choose tokens from the whole batch, as many as a predictor says (its algorithm 4).

The number of tokens of an expert is known only when the model runs, and a sample's result depends on the others of
its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.families.common import Family
from examples.families.token_choice import SparseDiT, SparseSizes


class DynamicLayer(nn.Module):
    """`threshold` (E,) is a moving average learned in training (equation 17); here it is a constant."""

    threshold: Tensor

    def __init__(self, sizes: SparseSizes) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.empty(sizes.width, sizes.experts))
        self.experts = nn.ModuleList(sizes.mlp() for _ in range(sizes.experts))
        self.capacity_predictor = nn.Sequential(
            nn.Linear(sizes.width, sizes.width, bias=False),
            nn.SiLU(),
            nn.Linear(sizes.width, sizes.experts, bias=False),
        )
        self.register_buffer("threshold", torch.full((sizes.experts,), 0.55))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])  # the pool of all tokens (S, D)
        capacity = torch.sigmoid(self.capacity_predictor(x.detach()))
        scores = torch.einsum("sd,de->se", x, self.router).softmax(dim=-1).permute(1, 0)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            k = torch.where(capacity[:, i] > self.threshold[i], 1, 0).sum().item()
            gating, index = torch.topk(scores[i], k, dim=-1, sorted=False)
            y[index, :] = y[index, :] + gating.unsqueeze(-1) * expert(x[index, :])
        return y.view(shape)


class DynamicDiT(SparseDiT):
    layer = DynamicLayer


FAMILY = Family(
    DynamicDiT,
    published={
        "DiffMoE-S-E16": SparseSizes(width=384, depth=12, heads=6),
        "DiffMoE-B-E16": SparseSizes(width=768, depth=12, heads=12),
        "DiffMoE-L-E8": SparseSizes(width=1024, depth=24, heads=16, experts=8),
        "DiffMoE-L-E16": SparseSizes(width=1024, depth=24, heads=16),
    },
    reduced=SparseSizes(width=32, depth=4, heads=4, side=8, classes=10, experts=4, mlp_ratio=2.0),
)
