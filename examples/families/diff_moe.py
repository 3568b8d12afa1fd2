"""Diff-MoE: experts that also see the timestep and a summary of the whole image (its sections 4.1 to 4.4).

A depthwise convolution over the image precedes the experts. Every expert has its own adaLN, computed from the
condition (4.2), and routed experts multiply their hidden channels by a global context (4.3, equation 8). Both use
linear maps of low rank (4.4).

The paper does not say where all parameters are. This reading gives table 1's counts
(tests/examples/test_families.py): a 5x5 convolution; a shared expert of inner width D, as in DiT-MoE; one global
context a block, shared by its routed experts; the block's own adaLN as in DiT.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dit import Block, DiffusionTransformer, Sizes, SwiGLU, modulate
from examples.families.common import Family


@dataclass(frozen=True)
class TimeAwareSizes(Sizes):
    """Routed experts have the inner width mlp_ratio * D, each of the `shared` experts D."""

    mlp_ratio: float = 5 / 3
    experts: int = 8
    top_k: int = 1
    shared: int = 1
    rank: int = 64

    @property
    def hidden(self) -> int:
        return int(self.mlp_ratio * self.width)


class LowRank(nn.Sequential):
    """A linear map through `rank` dimensions (section 4.4)."""

    def __init__(self, width: int, out: int, rank: int, bias: bool) -> None:
        super().__init__(nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=bias))


class TimedExpert(SwiGLU):
    """An expert on rows (R, D) with each row's condition (R, D) and, where it is routed, global context (R, H)."""

    def __init__(self, sizes: TimeAwareSizes, hidden: int) -> None:
        super().__init__(sizes.width, hidden)
        self.timing = LowRank(sizes.width, 3 * sizes.width, sizes.rank, bias=True)

    def forward(self, rows: Tensor, c: Tensor, context: Tensor | None = None) -> Tensor:
        shift, scale, strength = self.timing(F.silu(c)).chunk(3, dim=-1)
        rows = rows * (1 + scale) + shift
        hidden = F.silu(self.gate_proj(rows)) * self.up_proj(rows)
        if context is not None:
            hidden = hidden * context
        return strength * self.down_proj(hidden)


class TimeAwareLayer(nn.Module):
    def __init__(self, sizes: TimeAwareSizes) -> None:
        super().__init__()
        self.top_k = sizes.top_k
        self.router = nn.Linear(sizes.width, sizes.experts, bias=False)
        self.context = LowRank(sizes.width, sizes.hidden, sizes.rank, bias=False)
        self.experts = nn.ModuleList(TimedExpert(sizes, sizes.hidden) for _ in range(sizes.experts))
        self.shared = TimedExpert(sizes, sizes.shared * sizes.width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        context = F.silu(self.context(x.mean(dim=1)))  # (B, H), equation 7
        rows, row_c = x.reshape(-1, width), c.repeat_interleave(tokens, dim=0)
        weights, ids = self.router(rows).softmax(dim=-1).topk(self.top_k, dim=-1)
        routed = self.route(rows, row_c, context.repeat_interleave(tokens, dim=0), ids, weights)
        return (routed + self.shared(rows, row_c)).view(batch, tokens, width)

    def route(self, rows: Tensor, c: Tensor, context: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Run each expert on the rows that chose it, with the condition and context of their samples."""
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() > 0:
                out.index_add_(0, token, weights[token, slot, None] * expert(rows[token], c[token], context[token]))
        return out


class TimeAwareBlock(Block):
    """The convolution joins the residual stream after the attention, so the experts' norm reads its output."""

    def __init__(self, sizes: TimeAwareSizes) -> None:
        super().__init__(sizes.width, sizes.heads, lambda: TimeAwareLayer(sizes), sizes.grid)
        self.grid = sizes.grid
        self.convolution = nn.Conv2d(sizes.width, sizes.width, 5, padding=2, groups=sizes.width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + self.mix(x)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2), c)

    def mix(self, x: Tensor) -> Tensor:
        picture = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.convolution(picture).flatten(2).transpose(1, 2)


class TimeAwareDiT(DiffusionTransformer):
    """Rotary positions besides DiT's added ones, which the paper's parameter counts include."""

    def __init__(self, sizes: TimeAwareSizes) -> None:
        super().__init__(sizes, lambda index: TimeAwareBlock(sizes))


FAMILY = Family(
    TimeAwareDiT,
    published={
        "Diff-MoE-S": TimeAwareSizes(width=384, depth=12, heads=6),
        "Diff-MoE-S+": TimeAwareSizes(width=384, depth=12, heads=6, mlp_ratio=4.0, top_k=2, shared=2),
        "Diff-MoE-B": TimeAwareSizes(width=768, depth=12, heads=12),
        "Diff-MoE-B+": TimeAwareSizes(width=768, depth=12, heads=12, mlp_ratio=4.0, top_k=2, shared=2),
        "Diff-MoE-L": TimeAwareSizes(width=1024, depth=24, heads=16),
        "Diff-MoE-XL": TimeAwareSizes(width=1152, depth=28, heads=16, mlp_ratio=4.0, top_k=2, shared=2),
    },
    reduced=TimeAwareSizes(width=32, depth=3, heads=4, side=8, classes=10, experts=4, rank=8),
)
