"""A small DiT-MoE as people write them, for tests: it knows nothing of caching or compiling.

adaLN-zero blocks, 2-D RoPE, fused qkv, every second block a MoE with a shared expert and
sorted-segment dispatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Sizes of a TinyDiTMoE; a picture has channels x side x side values, in patches of patch x patch."""

    side: int = 8
    patch: int = 2
    channels: int = 1
    width: int = 32
    heads: int = 4
    depth: int = 4
    experts: int = 6
    top_k: int = 2
    classes: int = 10
    expert_width: int = 48

    @property
    def tokens(self) -> int:
        return (self.side // self.patch) ** 2


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sinusoidal(t: Tensor, width: int) -> Tensor:
    """t (B,) in [0, 1] -> (B, width)."""
    frequencies = torch.exp(-torch.arange(width // 2, device=t.device) * (9.21034 / (width // 2)))
    angles = 1000 * t[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_table(side: int, head_width: int) -> Tensor:
    """Angles of 2-D rotary positions, (side * side, head_width // 2): half rows, half columns."""
    frequencies = 100.0 ** (-torch.arange(head_width // 4) / (head_width // 4))
    positions = torch.arange(side).float()
    along = positions[:, None] * frequencies[None]
    rows, columns = along.repeat_interleave(side, 0), along.repeat(side, 1)
    return torch.cat([rows, columns], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Router(nn.Module):
    """Sigmoid scores, the top k of them normalized to a sum of 1 and scaled."""

    def __init__(self, width: int, experts: int, top_k: int, scale: float = 1.5) -> None:
        super().__init__()
        self.top_k, self.scale = top_k, scale
        self.weight = nn.Parameter(torch.randn(experts, width) / width**0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, self.weight).sigmoid()
        weights, ids = torch.topk(scores, self.top_k, dim=-1, sorted=False)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * self.scale


class MoE(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.top_k = sizes.top_k
        self.gate = Router(sizes.width, sizes.experts, sizes.top_k)
        self.experts = nn.ModuleList(SwiGLU(sizes.width, sizes.expert_width) for _ in range(sizes.experts))
        self.shared_experts = SwiGLU(sizes.width, 2 * sizes.expert_width)

    def forward(self, x: Tensor) -> Tensor:
        identity, shape = x, x.shape
        ids, weights = self.gate(x)
        x = x.reshape(-1, shape[-1])
        y = self.moe_infer(x, ids.reshape(-1), weights.reshape(-1, 1)).view(*shape)
        return y + self.shared_experts(identity)

    @torch.no_grad()
    def moe_infer(self, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
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
            expert_cache.scatter_reduce_(
                0, exp_token_idx.view(-1, 1).repeat(1, x.shape[-1]), expert_out, reduce="sum"
            )
        return expert_cache


class Block(nn.Module):
    def __init__(self, sizes: Sizes, moe: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(sizes.width, sizes.heads)
        self.norm2 = nn.LayerNorm(sizes.width, elementwise_affine=False, eps=1e-6)
        self.mlp: nn.Module = MoE(sizes) if moe else Mlp(sizes.width)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(sizes.width, 6 * sizes.width))

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), cos, sin)
        x = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x


class TinyDiTMoE(nn.Module):
    """forward(x (B, C, H, W), t (B,), y (B,)) -> (B, C, H, W)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Sizes | None = None) -> None:
        super().__init__()
        self.sizes = sizes = sizes or Sizes()
        self.embed = nn.Conv2d(sizes.channels, sizes.width, sizes.patch, stride=sizes.patch)
        self.time = nn.Sequential(nn.Linear(sizes.width, sizes.width), nn.SiLU(), nn.Linear(sizes.width, sizes.width))
        self.label = nn.Embedding(sizes.classes + 1, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes, moe=i % 2 == 1) for i in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, elementwise_affine=False, eps=1e-6)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(sizes.width, 2 * sizes.width))
        self.head = nn.Linear(sizes.width, sizes.channels * sizes.patch**2)
        table = rope_table(sizes.side // sizes.patch, sizes.width // sizes.heads)
        self.register_buffer("cos", table.cos(), persistent=False)
        self.register_buffer("sin", table.sin(), persistent=False)

    def embed_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) and condition (B, D)."""
        return self.embed(x).flatten(2).transpose(1, 2), self.time(sinusoidal(t, self.sizes.width)) + self.label(y)

    def finish(self, h: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, N, D) and condition (B, D) to a picture (B, C, H, W)."""
        sizes, grid = self.sizes, self.sizes.side // self.sizes.patch
        shift, scale = self.adaln(c).chunk(2, dim=1)
        h = self.head(modulate(self.norm(h), shift, scale))
        h = h.reshape(-1, grid, grid, sizes.patch, sizes.patch, sizes.channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(-1, sizes.channels, sizes.side, sizes.side)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.embed_inputs(x, t, y)
        for block in self.blocks:
            h = block(h, c, self.cos, self.sin)
        return self.finish(h, c)


def make_model(sizes: Sizes | None = None, seed: int = 0) -> TinyDiTMoE:
    """A model in eval mode with random weights, adaLN gates among them, so that every block counts."""
    torch.manual_seed(seed)
    return TinyDiTMoE(sizes).eval().requires_grad_(False)


def make_inputs(model: TinyDiTMoE, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Noise (B, C, H, W) and class labels (B,) to start a generation from."""
    generator = torch.Generator().manual_seed(seed)
    sizes = model.sizes
    noise = torch.randn(batch, sizes.channels, sizes.side, sizes.side, generator=generator)
    return noise, torch.randint(sizes.classes, (batch,), generator=generator)
