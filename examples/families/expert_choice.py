"""EC-DiT: each expert chooses the tokens of a sample that it scores highest (DiffMoE's algorithm 1).

Several experts or none may choose a token. With the capacity S / E, the layer costs as much as a dense feed-forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.families.common import Family
from examples.families.token_choice import SparseDiT, SparseSizes


class ExpertChoiceLayer(nn.Module):
    def __init__(self, sizes: SparseSizes) -> None:
        super().__init__()
        self.capacity = max(1, sizes.tokens * sizes.top_k // sizes.experts)
        self.router = nn.Parameter(torch.empty(sizes.width, sizes.experts))
        self.experts = nn.ModuleList(sizes.mlp() for _ in range(sizes.experts))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.einsum("bsd,de->bse", x, self.router).softmax(dim=-1).permute(0, 2, 1)
        gating, index = torch.topk(scores, self.capacity, dim=-1)  # (B, E, C)
        dispatch = F.one_hot(index, num_classes=x.shape[1]).to(x.dtype)  # (B, E, C, S)
        taken = torch.einsum("becs,bsd->becd", dispatch, x)
        results = torch.stack([expert(taken[:, e]) for e, expert in enumerate(self.experts)], dim=1)
        return torch.einsum("becs,bec,becd->bsd", dispatch, gating, results)


class ExpertChoiceDiT(SparseDiT):
    layer = ExpertChoiceLayer


FAMILY = Family(
    ExpertChoiceDiT,
    published={
        "EC-DiT-S-E16": SparseSizes(width=384, depth=12, heads=6),
        "EC-DiT-B-E16": SparseSizes(width=768, depth=12, heads=12),
        "EC-DiT-L-E16": SparseSizes(width=1024, depth=24, heads=16),
    },
    reduced=SparseSizes(width=32, depth=4, heads=4, side=8, classes=10, experts=4, mlp_ratio=2.0),
)
