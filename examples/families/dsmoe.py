"""DSMoE: experts in every second block, chosen as in DeepSeek-V3, and one shared expert.

Experts are chosen by sigmoid scores plus a bias that balances the load, within the best groups of experts if there
are groups. The weights are the scores without the bias, normalized over a token's experts and scaled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dit import Block, DiffusionTransformer, Mlp, Sizes, SwiGLU
from examples.families.common import Family


@dataclass(frozen=True)
class DSMoESizes(Sizes):
    """`expert_width` is the inner width of the routed experts and of the shared one.

    Experts are chosen from the best half of `groups` groups; 1 means no groups.
    """

    experts: int = 16
    expert_width: int = 768
    top_k: int = 2
    groups: int = 1
    scale: float = 2.0


class GroupedSigmoidRouter(nn.Module):
    """rows (T, D) -> expert ids and weights, both (T, k)."""

    def __init__(self, sizes: DSMoESizes) -> None:
        super().__init__()
        self.top_k, self.groups, self.scale = sizes.top_k, sizes.groups, sizes.scale
        self.weight = nn.Parameter(torch.empty(sizes.experts, sizes.width))
        self.bias = nn.Parameter(torch.empty(sizes.experts))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(rows.float(), self.weight.float()).sigmoid()
        ids = self.within_groups(scores + self.bias).topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(-1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale
        return ids, weights.to(rows.dtype)

    def within_groups(self, scores: Tensor) -> Tensor:
        """Scores (T, E) with those outside the best groups set to 0. A group's score is the sum of its best two."""
        if self.groups == 1:
            return scores
        by_group = scores.unflatten(-1, (self.groups, -1))
        goodness = by_group.topk(2, dim=-1).values.sum(-1)  # (T, groups)
        best = goodness.topk(self.groups // 2, dim=-1).indices
        allowed = torch.zeros_like(goodness).scatter(-1, best, 1.0)
        return by_group.masked_fill(allowed.unsqueeze(-1) == 0, 0.0).flatten(-2)


class DSMoELayer(nn.Module):
    def __init__(self, sizes: DSMoESizes) -> None:
        super().__init__()
        self.top_k = sizes.top_k
        self.router = GroupedSigmoidRouter(sizes)
        self.experts = nn.ModuleList(SwiGLU(sizes.width, sizes.expert_width) for _ in range(sizes.experts))
        self.shared = SwiGLU(sizes.width, sizes.expert_width)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        ids, weights = self.router(rows)
        return self.dispatch(rows, ids.flatten(), weights.flatten()).view_as(x) + self.shared(x)

    @torch.no_grad()
    def dispatch(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Sort the branches (T * k) by expert, and run each expert on its segment."""
        order = ids.argsort()
        ends = ids.bincount(minlength=len(self.experts)).cpu().numpy().cumsum()
        token = order // self.top_k
        out = torch.zeros_like(rows)
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            if start == end:
                continue
            chosen = token[start:end]
            result = self.experts[e](rows[chosen]) * weights[order[start:end], None]
            out.index_add_(0, chosen, result.to(out.dtype))
        return out


class DSMoE(DiffusionTransformer):
    """Dense and MoE feed-forwards alternate; rotary positions only."""

    def __init__(self, sizes: DSMoESizes) -> None:
        def dense() -> Mlp:
            return Mlp(sizes.width, int(sizes.mlp_ratio * sizes.width))

        def block(index: int) -> Block:
            feedforward = dense if index % 2 == 0 else lambda: DSMoELayer(sizes)
            return Block(sizes.width, sizes.heads, feedforward, sizes.grid)

        super().__init__(sizes, block, added_positions=False)


FAMILY = Family(
    DSMoE,
    published={
        "DSMoE-S-E16": DSMoESizes(width=384, depth=10, heads=6, groups=2),
        "DSMoE-S-E48": DSMoESizes(width=384, depth=12, heads=6, experts=48, expert_width=128, top_k=5, scale=2.5),
        "DSMoE-L-E16": DSMoESizes(width=1024, depth=20, heads=16, expert_width=2048, groups=2),
        "DSMoE-L-E48": DSMoESizes(width=1024, depth=24, heads=16, experts=48, expert_width=448, top_k=5, scale=2.5),
    },
    reduced=DSMoESizes(width=32, depth=4, heads=4, side=8, classes=10, experts=8, expert_width=48, groups=2),
)
