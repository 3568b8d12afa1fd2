"""A small class-conditional DiT with mixture-of-experts layers, for 8x8 images.

The form is that of DSMoE: adaLN-zero blocks, 2-D rotary positions, and in every second block a
mixture of SwiGLU experts with one shared expert. Nothing here knows of caching or of compilers.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DigitsConfig:
    """Sizes of the model. Every ``moe_every``-th block (the second, fourth, ...) holds experts."""

    image_size: int = 8
    channels: int = 1
    classes: int = 10
    width: int = 128
    depth: int = 6
    heads: int = 4
    mlp_ratio: int = 4
    moe_every: int = 2
    experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 192
    route_scale: float = 2.0


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def rotary_table_2d(side: int, head_dim: int, base: float = 100.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [side * side, head_dim]: half the pairs turn by row, half by column."""
    quarter = head_dim // 4
    frequencies = base ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.cat([row.reshape(-1, 1) * frequencies, column.reshape(-1, 1) * frequencies], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)  # [T, head_dim]
    return angles.cos(), angles.sin()


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of t in [0, 1], then an MLP: [B] -> [B, width]."""

    def __init__(self, width: int, frequencies: int = 64) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        exponents = torch.arange(self.frequencies, dtype=torch.float32, device=t.device) / self.frequencies
        angles = 1000.0 * t.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)[None]
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """One vector a class, and one more (index ``classes``) for "no class" in guidance."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.null_class = classes
        self.table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.table(y)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions: [B, T, D] -> [B, T, D]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        cos, sin = rotary_table_2d(side, self.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        return x * self.cos + rotate_half(x) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, head_dim]
        out = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoEGate(nn.Module):
    """Sigmoid router. Weights are normalized over a token's chosen experts, then scaled.

    In training the last call's balance loss is kept in ``balance_loss``: the share of choices that an
    expert gets over the batch times its mean normalized score, summed over the experts; 1 when balanced.
    """

    def __init__(self, width: int, experts: int, top_k: int, scale: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(experts, width))
        nn.init.normal_(self.weight, std=width**-0.5)
        self.balance_loss: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> expert indices and weights, both [B, T, k]."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        weights, indices = torch.topk(scores, self.top_k, dim=-1, sorted=False)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.scale
        if self.training:
            self.balance_loss = self.balance(scores, indices)
        return indices, weights.to(x.dtype)

    def balance(self, scores: Tensor, indices: Tensor) -> Tensor:
        experts = scores.shape[-1]
        chosen = F.one_hot(indices, experts).float().sum(dim=2)  # [B, T, E]
        share = chosen.mean(dim=(0, 1)) * experts / self.top_k
        mean_score = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=(0, 1))
        return (share * mean_score).sum()


class SparseMoE(nn.Module):
    """Top-k routed SwiGLU experts plus one shared expert that sees every token."""

    def __init__(self, cfg: DigitsConfig) -> None:
        super().__init__()
        self.top_k = cfg.experts_per_token
        self.gate = MoEGate(cfg.width, cfg.experts, cfg.experts_per_token, cfg.route_scale)
        self.experts = nn.ModuleList(SwiGLU(cfg.width, cfg.expert_width) for _ in range(cfg.experts))
        self.shared_expert = SwiGLU(cfg.width, cfg.expert_width)

    def forward(self, x: Tensor) -> Tensor:
        indices, weights = self.gate(x)
        rows = x.reshape(-1, x.shape[-1])
        if self.training:
            routed = self.moe_train(rows, indices.reshape(-1, self.top_k), weights.reshape(-1, self.top_k))
        else:
            routed = self.moe_infer(rows, indices.reshape(-1), weights.reshape(-1, 1))
        return routed.reshape(x.shape) + self.shared_expert(x)

    def moe_train(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Differentiable: each expert takes the rows that chose it. x [R, D], the others [R, k]."""
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(indices == number)
            out = out.index_add(0, row, (expert(x[row]) * weights[row, slot, None]).to(out.dtype))
        return out

    @torch.no_grad()
    def moe_infer(self, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
        """Branches sorted by expert, one slice an expert. x [R, D], indices [R * k], weights [R * k, 1]."""
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


class DiTBlock(nn.Module):
    def __init__(self, cfg: DigitsConfig, use_moe: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(cfg.width, cfg.heads, cfg.image_size)
        self.norm2 = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.mlp = SparseMoE(cfg) if use_moe else Mlp(cfg.width, cfg.mlp_ratio * cfg.width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 6 * cfg.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    def __init__(self, cfg: DigitsConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(cfg.width, cfg.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 2 * cfg.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DigitsDiT(nn.Module):
    """Velocity model v(x_t, t, y) of a rectified flow; every pixel is a token."""

    def __init__(self, cfg: DigitsConfig | None = None) -> None:
        super().__init__()
        self.cfg = cfg = cfg or DigitsConfig()
        self.x_embedder = nn.Linear(cfg.channels, cfg.width)
        self.pos_embed = nn.Parameter(torch.randn(1, cfg.image_size**2, cfg.width) * 0.02)
        self.t_embedder = TimestepEmbedder(cfg.width)
        self.y_embedder = LabelEmbedder(cfg.classes, cfg.width)
        self.blocks = nn.ModuleList(
            DiTBlock(cfg, use_moe=i % cfg.moe_every == cfg.moe_every - 1) for i in range(cfg.depth)
        )
        self.final_layer = FinalLayer(cfg)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.table.weight, std=0.02)
        # adaLN-zero: every block starts as the identity, the head as zero.
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name:
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.final_layer.linear.weight)

    def moe_layers(self) -> list[SparseMoE]:
        return [module for module in self.modules() if isinstance(module, SparseMoE)]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x [B, C, H, W], t [B] in [0, 1] (1 is noise), y [B] class or ``null_class`` -> velocity like x."""
        batch, channels, height, width = x.shape
        tokens = self.x_embedder(x.flatten(2).transpose(1, 2)) + self.pos_embed  # [B, T, D]
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        out = self.final_layer(tokens, c)
        return out.transpose(1, 2).reshape(batch, channels, height, width)
