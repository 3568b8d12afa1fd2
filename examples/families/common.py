"""What the families share: patches, positions, timestep and label, adaLN blocks, the transformer around them.

Nothing here knows of caching or of compilers. A family adds its feed-forwards, and where its papers say so, its own
block. Shapes: B samples, N tokens, D width, T = B * N rows, E experts, k experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Sizes that every family has. A latent has channels x side x side values, cut into patch x patch patches."""

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


@dataclass(frozen=True)
class Family:
    """A kind of model: its published sizes by name, and small ones for tests with the same structure."""

    model: Callable[[Sizes], DiffusionTransformer]
    published: Mapping[str, Sizes]
    reduced: Sizes


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) by one shift and scale (B, D) a sample."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sine_cosine_positions(grid: int, width: int) -> Tensor:
    """Fixed 2-D positions (grid * grid, width): one half for the row, one for the column."""
    frequencies = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (grid, width / 2)
    return torch.cat([along.repeat_interleave(grid, 0), along.repeat(grid, 1)], dim=-1)


def rotary_angles(grid: int, head_width: int) -> Tensor:
    """Angles of 2-D rotary positions (grid * grid, head_width): half the pairs turn by row, half by column."""
    frequencies = 100.0 ** (-torch.arange(head_width // 4) / (head_width // 4))
    along = torch.arange(grid)[:, None] * frequencies
    half = torch.cat([along.repeat_interleave(grid, 0), along.repeat(grid, 1)], dim=-1)
    return torch.cat([half, half], dim=-1)


class TimestepEmbedder(nn.Module):
    """Sines and cosines of t, then two linear layers: (B,) -> (B, D)."""

    def __init__(self, width: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.features // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device) / half)
        angles = t[:, None].float() * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    """Multi-head self-attention (B, N, D) -> (B, N, D), with 2-D rotary positions where `rotary`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Sizes, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = sizes.heads, rotary
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.proj = nn.Linear(sizes.width, sizes.width)
        if rotary:
            angles = rotary_angles(sizes.grid, sizes.width // sizes.heads)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, D / heads)
        if self.rotary:
            q, k = self.rotate(q), self.rotate(k)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with GELU between: the feed-forward of DiT."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """A gated feed-forward without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """An adaLN block: attention and a feed-forward, each with shift, scale and gate from the condition c (B, D)."""

    def __init__(self, sizes: Sizes, feedforward: nn.Module, rotary: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(sizes, rotary)
        self.norm2 = nn.LayerNorm(sizes.width, elementwise_affine=False, eps=1e-6)
        self.feedforward = feedforward
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(sizes.width, 6 * sizes.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.feedforward(modulate(self.norm2(x), shift2, scale2))


class DiffusionTransformer(nn.Module):
    """Class-conditional model of latents: forward(x (B, C, H, W), t (B,) in 0..1000, y (B,)) -> (B, C, H, W).

    Args:
        sizes: sizes of the model; label `sizes.classes` stands for "no class".
        block: makes the block at an index, counted from 0.
        added_positions: whether sin-cos positions are added to the tokens.
    """

    positions: Tensor

    def __init__(self, sizes: Sizes, block: Callable[[int], nn.Module], added_positions: bool = True) -> None:
        super().__init__()
        self.sizes, self.added_positions = sizes, added_positions
        self.patches = nn.Conv2d(sizes.channels, sizes.width, sizes.patch, stride=sizes.patch)
        self.time = TimestepEmbedder(sizes.width)
        self.label = nn.Embedding(sizes.classes + 1, sizes.width)
        self.blocks = nn.ModuleList(block(index) for index in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, elementwise_affine=False, eps=1e-6)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(sizes.width, 2 * sizes.width))
        self.head = nn.Linear(sizes.width, sizes.channels * sizes.patch**2)
        if added_positions:
            self.register_buffer("positions", sine_cosine_positions(sizes.grid, sizes.width), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)  # (B, N, D)
        if self.added_positions:
            h = h + self.positions
        c = self.time(t) + self.label(y)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.adaln(c).chunk(2, dim=1)
        return self.unpatch(self.head(modulate(self.norm(h), shift, scale)))

    def unpatch(self, h: Tensor) -> Tensor:
        """(B, N, patch * patch * C) -> (B, C, side, side)."""
        sizes = self.sizes
        h = h.reshape(-1, sizes.grid, sizes.grid, sizes.patch, sizes.patch, sizes.channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(-1, sizes.channels, sizes.side, sizes.side)


def randomise(model: nn.Module, seed: int) -> None:
    """Random weights by the seed. adaLN gates are not zero, as they are before training: every block counts."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter.shape[1:].numel()
        spread = max(1, fan_in) ** -0.5 if parameter.dim() > 1 else 0.1
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
