"""The parts of a class-conditional DiT-MoE, from which the digits model, the families and the tests are built.

adaLN-zero blocks, 2-D rotary positions, and mixtures of SwiGLU experts with one shared expert. Nothing here depends
on caching or on a compiler. Shapes: B samples, N tokens, D width, T = B * N rows, E experts, k experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Sizes of a DiffusionTransformer. Images are (channels, side, side), cut into patches of patch x patch."""

    width: int
    depth: int
    heads: int
    side: int = 32
    channels: int = 4
    patch: int = 2
    classes: int = 1000
    mlp_ratio: float = 4.0

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.side // self.patch

    @property
    def tokens(self) -> int:
        return self.grid**2


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale x (B, N, D) by one shift and scale (B, D) for each sample."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sinusoidal(t: Tensor, features: int, scale: float = 1000.0) -> Tensor:
    """Cosines and sines (B, features) of a timestep (B,) in the range 0 to 1000 / scale."""
    half = features // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = scale * t.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sine_cosine_positions(grid: int, width: int) -> Tensor:
    """Fixed 2-D positions (grid * grid, width): one half for the row, one for the column."""
    frequencies = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (grid, width / 2)
    return torch.cat([along.repeat_interleave(grid, 0), along.repeat(grid, 1)], dim=-1)


def rotary_table(grid: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (grid * grid, head_width): half the pairs rotate by row, half by column."""
    frequencies = 100.0 ** (-torch.arange(head_width // 4) / (head_width // 4))
    along = torch.arange(grid)[:, None] * frequencies
    half = torch.cat([along.repeat_interleave(grid, 0), along.repeat(grid, 1)], dim=-1)
    angles = torch.cat([half, half], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., N, d) by the angles of a table (N, d) whose two halves are equal."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of a timestep in 0 to 1000 / scale, then two linear layers: (B,) -> (B, D)."""

    def __init__(self, width: int, features: int = 256, scale: float = 1.0) -> None:
        super().__init__()
        self.features, self.scale = features, scale
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoidal(t, self.features, self.scale).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    """Multi-head self-attention (B, N, D) -> (B, N, D), with rotary positions if a `grid` is given."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, grid: int | None = None) -> None:
        super().__init__()
        self.heads, self.rotary = heads, grid is not None
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        if grid is not None:
            cos, sin = rotary_table(grid, width // heads)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*self.split_heads(x))
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, heads, N, D / heads), the first two rotated."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.rotary:
            q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        return q, k, v


class Mlp(nn.Module):
    """Two linear layers with GELU between: the feed-forward of DiT."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """A gated feed-forward."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Sigmoid scores; the k best are normalized to a sum of 1 and scaled: (B, N, D) -> ids and weights (B, N, k)."""

    def __init__(self, width: int, experts: int, top_k: int, scale: float) -> None:
        super().__init__()
        self.top_k, self.scale = top_k, scale
        self.weight = nn.Parameter(torch.empty(experts, width))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.choose(self.scores(x), x.dtype)

    def scores(self, x: Tensor) -> Tensor:
        """(B, N, E), in float32 at least."""
        return self.logits(x).sigmoid()

    def logits(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))

    def choose(self, scores: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(scores, self.top_k, dim=-1, sorted=False)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.scale
        return ids, weights.to(dtype)


class SoftmaxRouter(Router):
    """The softmax over the experts; the weights are the probabilities of the k best, scaled (DiT-MoE)."""

    def scores(self, x: Tensor) -> Tensor:
        return self.logits(x).softmax(dim=-1)

    def choose(self, scores: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(scores, self.top_k, dim=-1, sorted=False)
        return ids, (weights * self.scale).to(dtype)


class MoE(nn.Module):
    """Routed SwiGLU experts and one shared expert that sees every token: (B, N, D) -> (B, N, D)."""

    def __init__(self, router: Router, hidden: int, shared_hidden: int) -> None:
        super().__init__()
        experts, width = router.weight.shape
        self.top_k, self.gate = router.top_k, router
        self.experts = nn.ModuleList(SwiGLU(width, hidden) for _ in range(experts))
        self.shared_expert = SwiGLU(width, shared_hidden)

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.gate(x)
        rows = x.reshape(-1, x.shape[-1])
        routed = self.moe_infer(rows, ids.reshape(-1), weights.reshape(-1, 1))
        return routed.reshape(x.shape) + self.shared_expert(x)

    @torch.no_grad()
    def moe_infer(self, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
        """Run each expert on its slice of the sorted branches: x (T, D), indices (T * k,), weights (T * k, 1)."""
        expert_cache = torch.zeros_like(x)
        order = flat_expert_indices.argsort()
        ends = flat_expert_indices.bincount(minlength=len(self.experts)).cpu().numpy().cumsum(0)
        token_indices = order // self.top_k
        for number, end in enumerate(ends):
            start = 0 if number == 0 else ends[number - 1]
            if start == end:
                continue
            expert = self.experts[number]
            rows = token_indices[start:end]
            expert_out = expert(x[rows])
            expert_out.mul_(flat_expert_weights[order[start:end]])
            expert_cache.scatter_reduce_(0, rows.view(-1, 1).repeat(1, x.shape[-1]), expert_out, reduce="sum")
        return expert_cache


class Block(nn.Module):
    """An adaLN block: attention and a feed-forward, each with shift, scale and gate from the condition c (B, D).

    Args:
        width, heads, grid: as for Attention.
        feedforward: creates the feed-forward.
    """

    def __init__(self, width: int, heads: int, feedforward: Callable[[], nn.Module], grid: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, grid)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = feedforward()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate (B, D) of the attention, then those of the feed-forward."""
        return self.adaLN_modulation(c).chunk(6, dim=1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """A modulated norm and the head: tokens (B, N, D) and condition (B, D) -> (B, N, out)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiffusionTransformer(nn.Module):
    """A class-conditional image model: forward(x (B, C, H, W), t (B,), y (B,)) -> (B, C, H, W).

    Args:
        sizes: sizes of the model; label `sizes.classes` means "no class".
        block: creates the block at an index, from 0.
        added_positions: whether sine-cosine positions are added to the tokens.
        time: creates the timestep embedder for a width; the default is for timesteps from 0 to 1000.
    """

    positions: Tensor

    def __init__(
        self,
        sizes: Sizes,
        block: Callable[[int], nn.Module],
        added_positions: bool = True,
        time: Callable[[int], nn.Module] = TimestepEmbedder,
    ) -> None:
        super().__init__()
        self.sizes, self.added_positions = sizes, added_positions
        self.embed = nn.Conv2d(sizes.channels, sizes.width, sizes.patch, stride=sizes.patch)
        self.time = time(sizes.width)
        self.label = nn.Embedding(sizes.classes + 1, sizes.width)
        self.blocks = nn.ModuleList(block(index) for index in range(sizes.depth))
        self.final_layer = FinalLayer(sizes.width, sizes.channels * sizes.patch**2)
        if added_positions:
            self.register_buffer("positions", sine_cosine_positions(sizes.grid, sizes.width), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.embed_inputs(x, t, y)
        for block in self.blocks:
            h = block(h, c)
        return self.finish(h, c)

    def embed_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) and condition (B, D)."""
        h = self.embed(x).flatten(2).transpose(1, 2)
        if self.added_positions:
            h = h + self.positions
        return h, self.time(t) + self.label(y)

    def finish(self, h: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, N, D) and condition (B, D) -> image (B, C, H, W)."""
        sizes, h = self.sizes, self.final_layer(h, c)
        h = h.reshape(-1, sizes.grid, sizes.grid, sizes.patch, sizes.patch, sizes.channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(-1, sizes.channels, sizes.side, sizes.side)
