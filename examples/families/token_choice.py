"""TC-DiT: experts in every second block, and each token chooses its best ones (DiffMoE's algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples.dit import Block, DiffusionTransformer, Mlp, Sizes
from examples.families.common import Family


@dataclass(frozen=True)
class SparseSizes(Sizes):
    """Sizes of the three models of the DiffMoE paper; their experts are DiT's feed-forwards."""

    experts: int = 16
    top_k: int = 1

    def mlp(self) -> Mlp:
        """A feed-forward; an expert has the same form."""
        return Mlp(self.width, int(self.mlp_ratio * self.width))


class SparseDiT(DiffusionTransformer):
    """DiT whose blocks have alternately a dense feed-forward and an MoE `layer`."""

    layer: type[nn.Module]

    def __init__(self, sizes: SparseSizes) -> None:
        def block(index: int) -> Block:
            feedforward = sizes.mlp if index % 2 == 0 else lambda: self.layer(sizes)
            return Block(sizes.width, sizes.heads, feedforward)

        super().__init__(sizes, block)


class TokenChoiceLayer(nn.Module):
    def __init__(self, sizes: SparseSizes) -> None:
        super().__init__()
        self.top_k = sizes.top_k
        self.router = nn.Parameter(torch.empty(sizes.width, sizes.experts))
        self.experts = nn.ModuleList(sizes.mlp() for _ in range(sizes.experts))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        scores = torch.einsum("bsd,de->bse", x, self.router).softmax(dim=-1)
        gating, index = torch.topk(scores, self.top_k, dim=-1)
        flat_index, gating = index.view(-1), gating.view(-1, self.top_k)
        x = x.view(-1, shape[-1]).repeat_interleave(self.top_k, dim=0)  # one row for each branch
        y = torch.empty_like(x)
        for i, expert in enumerate(self.experts):
            y[flat_index == i] = expert(x[flat_index == i])
        y = (y.view(*gating.shape, -1) * gating.unsqueeze(-1)).sum(dim=1)
        return y.view(shape)


class TokenChoiceDiT(SparseDiT):
    layer = TokenChoiceLayer


FAMILY = Family(
    TokenChoiceDiT,
    published={
        "TC-DiT-S-E16": SparseSizes(width=384, depth=12, heads=6),
        "TC-DiT-B-E16": SparseSizes(width=768, depth=12, heads=12),
        "TC-DiT-L-E16": SparseSizes(width=1024, depth=24, heads=16),
    },
    reduced=SparseSizes(width=32, depth=4, heads=4, side=8, classes=10, experts=6, mlp_ratio=2.0),
)
