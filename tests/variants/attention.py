"""Attentions, taken apart: queries, keys and values; the attending; the projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dit import rotate


@dataclass(frozen=True)
class Attending:
    """How an attention is written.

    fused: one linear for queries, keys and values (needs as many key heads as heads)
    norm: None, "layer" or "rms", of queries and keys
    rope: None, "half", "interleaved" or "complex"
    kernel: "sdpa" or "softmax", spelled out
    kv_heads: as many as heads, or fewer; then spread: "told", SDPA is, "repeated" by repeat_interleave, or
        "expanded" and reshaped
    mask: None, "additive" (a bias of positions), "padding" (an argument of the model)
    text: whether keys and values of text tokens follow the picture's
    """

    fused: bool = True
    norm: str | None = None
    rope: str | None = "half"
    kernel: str = "sdpa"
    heads: int = 4
    kv_heads: int = 4
    spread: str = "told"
    mask: str | None = None
    text: bool = False


class Attention(nn.Module):
    def __init__(self, how: Attending, width: int, tokens: int) -> None:
        super().__init__()
        self.how, self.head = how, width // how.heads
        inner = how.kv_heads * self.head
        if how.fused:
            self.qkv = nn.Linear(width, width + 2 * inner)
        else:
            self.q, self.k, self.v = (nn.Linear(width, size) for size in (width, inner, inner))
        if how.text:
            self.text_k, self.text_v = nn.Linear(width, inner), nn.Linear(width, inner)
        self.q_norm, self.k_norm = (norm_of(how.norm, self.head) for _ in range(2))
        self.proj = nn.Linear(width, width)
        if how.mask == "additive":
            self.bias = nn.Parameter(torch.randn(1, how.heads, tokens, tokens))

    def forward(self, x: Tensor, rope: Tensor, text: Tensor | None, keep: Tensor | None) -> Tensor:
        q, k, v = self.heads(x, rope, text)
        return self.projected(self.attend(q, k, v, keep))

    def heads(self, x: Tensor, rope: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as the kernel gets them, (B, H, N, d)."""
        how = self.how
        if how.fused:
            inner = how.kv_heads * self.head
            q, k, v = self.qkv(x).split([x.shape[-1], inner, inner], dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = self.apart(q), self.apart(k), self.apart(v)
        q, k = rotated(self.q_norm(q), rope, how.rope), rotated(self.k_norm(k), rope, how.rope)
        if text is not None:
            k = torch.cat([k, self.k_norm(self.apart(self.text_k(text)))], dim=2)
            v = torch.cat([v, self.apart(self.text_v(text))], dim=2)
        if how.kv_heads < how.heads:
            k, v = (spread(each, how.heads // how.kv_heads, how.spread) for each in (k, v))
        return q, k, v

    def apart(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        mask = self.mask(keep, k.shape[2])
        if self.how.kernel == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] > k.shape[1])
        if q.shape[1] > k.shape[1]:
            k, v = (spread(each, q.shape[1] // k.shape[1], "repeated") for each in (k, v))
        scores = q @ k.transpose(-2, -1) * self.head**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1) @ v

    def mask(self, keep: Tensor | None, keys: int) -> Tensor | None:
        if self.how.mask == "additive":
            return F.pad(self.bias, (0, keys - self.bias.shape[-1]))
        if self.how.mask == "padding":
            assert keep is not None
            return F.pad(keep, (0, keys - keep.shape[-1]), value=True)[:, None, None, :]
        return None

    def projected(self, out: Tensor) -> Tensor:
        return self.proj(out.transpose(1, 2).flatten(2))


def spread(x: Tensor, times: int, how: str) -> Tensor:
    """Keys or values (B, H, N, d) for as many more heads."""
    if how == "told":
        return x
    if how == "repeated":
        return x.repeat_interleave(times, dim=1)
    batch, heads, tokens, width = x.shape
    return x[:, :, None].expand(batch, heads, times, tokens, width).reshape(batch, heads * times, tokens, width)


def norm_of(kind: str | None, width: int) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm(width)
    return nn.RMSNorm(width, eps=1e-6) if kind == "rms" else nn.Identity()


def angles(tokens: int, head: int) -> Tensor:
    """Rotary angles (N, head // 2)."""
    return torch.arange(tokens)[:, None] * 10.0 ** -(torch.arange(head // 2) / (head // 2))


def rotated(x: Tensor, rope: Tensor, how: str | None) -> Tensor:
    """x (B, H, N, d) turned by the angles (N, d // 2)."""
    if how is None:
        return x
    if how == "complex":
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(rope), rope)
        return torch.view_as_real(turned).flatten(-2).type_as(x)
    cos, sin = rope.cos().to(x.dtype), rope.sin().to(x.dtype)
    if how == "half":
        return rotate(x, torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1))
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
