"""Attention and blocks of every usual form: all of them are cached, and forced recomputation is the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dit import Block, modulate, rotate
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.plan import SAVES_NOTHING
from tests.harness import captured
from tests.models import Sizes, make_inputs
from tests.runtime.test_variants import SIZES, Variant, assert_forced_is_the_model

pytestmark = pytest.mark.usefixtures("eager_steps")
N, D, H, T = 16, 16, 2, 5
"""Tokens, width, heads and the tokens of a text."""
Attend = Callable[["Sampler", Block, Tensor], Tensor]


class Sampler(Variant):
    """Blocks whose attention is `attend_as` and whose block is `block_as`, where they are given."""

    def __init__(self, attend_as: Attend | None = None, block_as: Any = None, sizes: Sizes = SIZES) -> None:
        super().__init__(sizes)
        self.attend_as, self.block_as = attend_as, block_as
        self.norm_q, self.norm_k = nn.RMSNorm(8), nn.LayerNorm(8)
        self.to_kv = nn.Linear(D, 2 * D)
        self.dropout = nn.Dropout(0.1)
        self.whole = nn.MultiheadAttention(D, H, batch_first=True)
        self.grid = nn.Conv2d(D, D, 3, padding=1, groups=D)
        self.gates = nn.Linear(D, 12 * D)
        self.bias = nn.Parameter(torch.randn(H, N, N))
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) + 0.5)
        self.register_buffer("seen", torch.rand(N) < 0.7)
        self.register_buffer("angles", torch.rand(N, 4) * 3, persistent=False)

    def attend(self, block: Block, z: Tensor) -> Tensor:
        return self.attend_as(self, block, z) if self.attend_as else super().attend(block, z)

    def block(self, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        return self.block_as(self, block, h, m) if self.block_as else super().block(block, h, m)

    def separate(self, block: Block, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, N, H, d), not rotated."""
        q, k, v = block.attn.qkv(z).chunk(3, -1)
        return q.unflatten(-1, (H, 8)), k.unflatten(-1, (H, 8)), v.unflatten(-1, (H, 8))

    def text_of(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, T, H, d) of a text."""
        k, v = self.to_kv(self.text).expand(len(z), -1, -1).chunk(2, -1)
        return k.unflatten(-1, (H, 8)), v.unflatten(-1, (H, 8))


def flat(out: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, D)."""
    return out.transpose(1, 2).reshape(len(out), -1, D)


def merged(x: Tensor) -> Tensor:
    """(B, N, H, d) -> (B * H, N, d)."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], 8)


def apart(out: Tensor) -> Tensor:
    return flat(out.view(-1, H, N, 8))


def by(rows: Callable[..., Tensor]) -> Attend:
    """Attention given by its result (B, N, D) from queries, keys and values (B, N, H, d)."""
    return lambda model, block, z: block.attn.proj(rows(model, *model.separate(block, z)))


def by_head(result: Callable[..., Tensor]) -> Attend:
    """Attention given by its result (B, H, N, d) from rotated queries, keys and values (B, H, N, d)."""
    return lambda model, block, z: model.project(block, result(model, *model.qkv(block, z)))


def sdpa(**options: Any) -> Attend:
    return by_head(lambda model, q, k, v: F.scaled_dot_product_attention(q, k, v, **options))


def with_mask(mask: Callable[[Sampler, Tensor], Tensor]) -> Attend:
    return by_head(lambda model, q, k, v: F.scaled_dot_product_attention(q, k, v, mask(model, q)))


SPELLED: dict[str, Attend] = {
    "matmul": by_head(lambda model, q, k, v: (q * 8**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v),
    "dropout that is off": by_head(
        lambda model, q, k, v: model.dropout((q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)) @ v
    ),
    "upcast, with a bias": by_head(
        lambda model, q, k, v: F.softmax((q @ k.mT).float() / 8**0.5 + model.bias, -1, dtype=torch.float32) @ v
    ),
    "masked": by_head(lambda model, q, k, v: (q @ k.mT).masked_fill(~model.seen, -inf).softmax(-1) @ v),
    "a temperature": by_head(
        lambda model, q, k, v: (
            (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * model.temperature).softmax(-1) @ v
        )
    ),
    "bmm of merged heads": by(
        lambda model, q, k, v: apart(torch.bmm((torch.bmm(merged(q), merged(k).mT) * 8**-0.5).softmax(-1), merged(v)))
    ),
    "baddbmm": by(
        lambda model, q, k, v: apart(
            torch.bmm(
                torch.baddbmm(
                    torch.empty(len(q) * H, N, N, dtype=q.dtype), merged(q), merged(k).mT, beta=0, alpha=8**-0.5
                ).softmax(-1),
                merged(v),
            )
        )
    ),
    "baddbmm with a bias": by(
        lambda model, q, k, v: apart(
            torch.bmm(
                torch.baddbmm(model.bias.repeat(len(q), 1, 1), merged(q), merged(k).mT, alpha=0.3).softmax(-1),
                merged(v),
            )
        )
    ),
    "einsum": by_head(
        lambda model, q, k, v: torch.einsum(
            "bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).mul(0.3).softmax(-1), v
        )
    ),
    "einsum, heads behind": by(
        lambda model, q, k, v: torch.einsum(
            "bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3).softmax(-1), v
        ).flatten(2)
    ),
    "channels first": by(
        lambda model, q, k, v: apart(
            torch.bmm(merged(v).mT, (torch.bmm(merged(q), merged(k).mT) * 0.3).softmax(2).permute(0, 2, 1)).mT
        )
    ),
    "the dtype of the queries": by(
        lambda model, q, k, v: flat(F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))).type_as(
            q
        )
    ),
    "one head of keys": by_head(lambda model, q, k, v: (q @ k[:, :1].mT).softmax(-1) @ v[:, :1]),
    "a module": lambda model, block, z: model.whole(z, z, z, need_weights=False)[0],
    "a module with weights": lambda model, block, z: model.whole(z, z, z)[0],
}

MASKED: dict[str, Attend] = {
    "causal": sdpa(is_causal=True),
    "scaled, causal": sdpa(is_causal=True, scale=0.2),
    "keys that are hidden": with_mask(lambda model, q: model.seen[None]),
    "keys that are hidden, by sample": with_mask(
        lambda model, q: torch.stack([model.seen, model.seen.flip(0)])[:, None, None]
    ),
    "a bias by head": with_mask(lambda model, q: model.bias),
    "a bias by head and sample": with_mask(lambda model, q: model.bias * torch.arange(1.0, 3).view(2, 1, 1, 1)),
    "a mask of pairs": with_mask(lambda model, q: (torch.arange(N)[:, None] - torch.arange(N)).abs() < 5),
    "a bias from the queries": with_mask(lambda model, q: q @ model.bias[:, :8]),
    "a bias from the keys": with_mask(lambda model, q: q.sum(-1)[:, :, None]),
    "merged heads, causal": by(
        lambda model, q, k, v: apart(F.scaled_dot_product_attention(merged(q), merged(k), merged(v), is_causal=True))
    ),
    "merged heads and a bias": by(
        lambda model, q, k, v: apart(
            F.scaled_dot_product_attention(merged(q), merged(k), merged(v), model.bias.repeat(len(q), 1, 1))
        )
    ),
    "five dims": by_head(
        lambda model, q, k, v: F.scaled_dot_product_attention(
            *(x.unsqueeze(2) for x in (q, k, v)), model.bias[:, None]
        ).squeeze(2)
    ),
}


def grouped(repeat: Callable[[Tensor], Tensor], **options: Any) -> Attend:
    return by_head(
        lambda model, q, k, v: F.scaled_dot_product_attention(q, repeat(k[:, :1]), repeat(v[:, :1]), **options)
    )


GROUPED: dict[str, Attend] = {
    "enable_gqa": grouped(lambda k: k, enable_gqa=True),
    "repeat_interleave": grouped(lambda k: k.repeat_interleave(H, 1)),
    "repeat_interleave by the dim's name": grouped(lambda k: torch.repeat_interleave(k, repeats=H, dim=1)),
    "expanded and reshaped": grouped(lambda k: k[:, :, None].expand(-1, -1, H, -1, -1).reshape(len(k), H, N, 8)),
    "repeated": grouped(lambda k: k.repeat(1, H, 1, 1)),
}


def plain_rms(x: Tensor) -> Tensor:
    return x.float().mul(torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


def rotated_half_by_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotated_by_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], -1).flatten(-2)


def rotated_by_steps(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((-odd, even), -1).reshape(x.shape) * sin + x * cos


def rotated_as_complex(x: Tensor, table: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * table).flatten(-2).type_as(x)


def rotated_by_matrices(x: Tensor, table: Tensor) -> Tensor:
    """Rotations as 2 x 2 matrices (N, 1, d / 2, 2, 2)."""
    pairs = x.unflatten(-1, (-1, 1, 2))
    return (table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]).flatten(-2)


def rotary(rotated: Callable[..., Tensor], *tables: Callable[[Tensor], Tensor]) -> Attend:
    """`tables` give what `rotated` takes beside (B, H, N, d), from the angles (N, 4)."""

    def attend(model: Sampler, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        given = [table(model.angles) for table in tables]
        return flat(F.scaled_dot_product_attention(rotated(q, *given), rotated(k, *given), v))

    return by(attend)


def rotary_before_heads(model: Sampler, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    table = torch.polar(torch.ones_like(model.angles), model.angles)[:, None]
    q, k = rotated_as_complex(q, table), rotated_as_complex(k, table)
    return flat(F.scaled_dot_product_attention(*(x.permute(0, 2, 1, 3) for x in (q, k, v))))


def twice(of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda angles: torch.cat([of(angles), of(angles)], -1)


def each_twice(of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda angles: of(angles).repeat_interleave(2, -1)


def matrices(angles: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))


def from_grid(angles: Tensor) -> Tensor:
    """Angles of rows and columns, computed in the graph."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    frequencies = 0.5 ** torch.arange(2.0)
    return torch.cat([p.flatten()[:, None] * frequencies for p in (rows, columns)], -1)


POSITIONED: dict[str, Attend] = {
    "norms by head": by_head(
        lambda model, q, k, v: F.scaled_dot_product_attention(model.norm_q(q), model.norm_k(k), v)
    ),
    "norms before the heads": lambda model, block, z: model.project(
        block,
        F.scaled_dot_product_attention(
            *(
                (F.rms_norm(x, (D,)) if i < 2 else x).unflatten(-1, (H, 8)).permute(0, 2, 1, 3)
                for i, x in enumerate(block.attn.qkv(z).chunk(3, -1))
            )
        ),
    ),
    "norms written out": by_head(
        lambda model, q, k, v: F.scaled_dot_product_attention(plain_rms(q), plain_rms(k), v)
    ),
    "separate projections": lambda model, block, z: model.project(
        block,
        F.scaled_dot_product_attention(
            *(F.linear(z, w).view(-1, N, H, 8).transpose(1, 2) for w in block.attn.qkv.weight.chunk(3))
        ),
    ),
    "halves by themselves": rotary(rotated_half_by_half, torch.cos, torch.sin),
    "halves": rotary(rotate, twice(torch.cos), twice(torch.sin)),
    "halves, leading dims": rotary(
        rotate, lambda a: twice(torch.cos)(a)[None, None], lambda a: twice(torch.sin)(a)[None, None]
    ),
    "halves, a table a sample": rotary(
        rotate,
        *(lambda a, f=f: twice(f)(a).expand(2, 1, -1, -1) * torch.ones(2, 1, 1, 1) for f in (torch.cos, torch.sin)),
    ),
    "pairs": rotary(rotated_by_pairs, torch.cos, torch.sin),
    "pairs by steps": rotary(rotated_by_steps, each_twice(torch.cos), each_twice(torch.sin)),
    "pairs, of a grid": rotary(rotated_by_pairs, lambda a: from_grid(a).cos(), lambda a: from_grid(a).sin()),
    "complex": rotary(rotated_as_complex, lambda a: torch.polar(torch.ones_like(a), a)),
    "complex, of a grid": rotary(
        rotated_as_complex, lambda a: torch.polar(torch.ones(N, 4), from_grid(a))[None, None]
    ),
    "complex, before the heads": by(rotary_before_heads),
    "matrices": rotary(rotated_by_matrices, matrices),
}


def joined(order: Callable[[Tensor, Tensor], list[Tensor]], dim: int = 2) -> Attend:
    """Keys and values of picture and text together; dim 2 joins them by head, dim 1 before."""

    def attend(model: Sampler, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        texts = model.text_of(q)
        if dim == 1:
            k, v = (torch.cat(order(x, text), 1) for x, text in zip((k, v), texts, strict=True))
            return flat(F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (torch.cat(order(x, text.transpose(1, 2)), 2) for x, text in zip((k, v), texts, strict=True))
        return flat(F.scaled_dot_product_attention(q, k, v))

    return by(attend)


def joined_before_projection(model: Sampler, block: Block, z: Tensor) -> Tensor:
    """One projection of picture and text, keys normed and rotated after it."""
    both = torch.cat([z, model.text.expand(len(z), -1, -1)], 1)
    k, v = model.to_kv(both).unflatten(-1, (2, H, 8)).permute(2, 0, 3, 1, 4)
    k = rotate(model.norm_k(k), *(torch.cat([t, torch.ones(T, 8)]) for t in (block.attn.cos, block.attn.sin)))
    q = model.separate(block, z)[0].transpose(1, 2)
    return model.project(block, F.scaled_dot_product_attention(q, k, v))


def joined_to_the_time(model: Sampler, block: Block, z: Tensor) -> Tensor:
    """Keys and values of the condition, which changes at every step."""
    q, k, v = (x.transpose(1, 2) for x in model.separate(block, z))
    text = model.condition[:, None].unflatten(-1, (H, 8)).transpose(1, 2)
    return model.project(block, F.scaled_dot_product_attention(q, torch.cat([k, text], 2), torch.cat([text, v], 2)))


def joined_and_masked(model: Sampler, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (torch.cat([text.transpose(1, 2), x], 2) for x, text in zip((k, v), model.text_of(q), strict=True))
    mask = torch.cat([torch.arange(T) < 3, model.seen])[None, None, None]
    bias = torch.arange(N)[:, None] * 0.01 * torch.arange(N + T)
    return flat((q @ k.mT * 0.3 + bias).masked_fill(~mask, -inf).softmax(-1) @ v)


JOINED: dict[str, Attend] = {
    "text behind": joined(lambda x, text: [x, text]),
    "text before": joined(lambda x, text: [text, x]),
    "text around": joined(lambda x, text: [text[:, :1], x, text], dim=1),
    "one projection": joined_before_projection,
    "masked": by(joined_and_masked),
}


def cross(attend: Callable[[Sampler, Tensor, Tensor, Tensor], Tensor]) -> Any:
    """Self-attention, then attention to a text, then the feed-forward."""

    def block_as(model: Sampler, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        h = h + m[2].unsqueeze(1) * model.attend(block, modulate(block.norm1(h), m[0], m[1]))
        q = model.extra(block.norm2(h)).unflatten(-1, (H, 8)).transpose(1, 2)
        k, v = (x.transpose(1, 2) for x in model.text_of(h))
        h = h + flat(attend(model, q, k, v))
        return h + m[5].unsqueeze(1) * block.mlp(modulate(block.norm2(h), m[3], m[4]))

    return block_as


CROSS = {
    "plain": cross(lambda model, q, k, v: F.scaled_dot_product_attention(q, k, v)),
    "masked": cross(
        lambda model, q, k, v: F.scaled_dot_product_attention(q, k, v, (torch.arange(T) < 3)[None, None, None])
    ),
    "a bias of pairs": cross(lambda model, q, k, v: F.scaled_dot_product_attention(q, k, v, model.bias[:, :, :T])),
    "spelled out": cross(lambda model, q, k, v: (model.norm_q(q) @ model.norm_k(k).mT).softmax(-1) @ v),
}


def residuals(add: Callable[..., Tensor]) -> Any:
    """A block whose branches are added by add(model, stream, gate, branch)."""

    def block_as(model: Sampler, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        h = add(model, h, m[2].unsqueeze(1), model.attend(block, modulate(block.norm1(h), m[0], m[1])))
        return add(model, h, m[5].unsqueeze(1), block.mlp(modulate(block.norm2(h), m[3], m[4])))

    return block_as


def chunked_by_twelve(model: Sampler, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
    """Shift, scale and gate before and after each branch."""
    a = model.gates(model.condition)[:, None].chunk(12, dim=-1)
    z = model.attend(block, block.norm1(h) * (1 + a[1]) + a[0])
    h = h + a[2] * (block.norm1(z) * (1 + a[4]) + a[3])
    z = block.mlp(block.norm2(h) * (1 + a[7]) + a[6])
    return h + a[8] * (block.norm2(z) * (1 + a[10]) + a[9])


def chunked_by_four(model: Sampler, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
    """Scales and squashed gates, no shifts."""
    scale1, gate1, scale2, gate2 = model.gates(model.condition)[:, None, : 4 * D].chunk(4, dim=2)
    z = model.attend(block, block.norm1(h) * (1 + scale1))
    h = h + gate1.clamp(-1, 1).tanh() * block.norm2(z)
    return h + gate2.tanh() * block.norm2(block.mlp(block.norm2(h) * (1 + scale2)))


def norms_written_out(model: Sampler, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
    """Before and after each branch."""
    h = h + m[2].tanh()[:, None] * plain_rms(model.attend(block, plain_rms(h) * (1 + m[1][:, None])))
    return h + m[5].tanh()[:, None] * plain_rms(block.mlp(plain_rms(h) * (1 + m[4][:, None])))


def chunked_by_two(model: Sampler, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
    """Modulated norms before the branches, no gates."""
    shift, scale = model.gates(model.condition)[:, : 2 * D].chunk(2, dim=1)
    h = h + model.attend(block, modulate(block.norm1(h), shift, scale))
    return h + block.mlp(modulate(block.norm2(h), shift, scale))


def post_norm(model: Sampler, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
    h = block.norm1(h + model.attend(block, h))
    return block.norm2(h + block.mlp(h))


def in_place(model: Sampler, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
    h = h.clone()
    h += model.attend(block, block.norm1(h)).mul_(m[2][:, None])
    h.add_(block.mlp(block.norm2(h)))
    return h


BLOCKS = {
    "addcmul": residuals(lambda model, h, gate, z: torch.addcmul(h, gate, z)),
    "addcmul, branch before gate": residuals(lambda model, h, gate, z: torch.addcmul(h, z, gate, value=0.7)),
    "branch before stream": residuals(lambda model, h, gate, z: z * gate + h),
    "dropout that is off": residuals(lambda model, h, gate, z: h + model.dropout(gate * model.dropout(z))),
    "a scaled branch": residuals(lambda model, h, gate, z: torch.add(h, z * gate, alpha=0.5)),
    "a layer scale": residuals(lambda model, h, gate, z: h + model.gates.bias[:D] * z),
    "a scaled stream": residuals(lambda model, h, gate, z: (h + gate * z) / 2**0.5),
    "branch and stream in float64": residuals(lambda model, h, gate, z: (h.double() + gate * z).float()),
    "in place": in_place,
    "two chunks": chunked_by_two,
    "four chunks": chunked_by_four,
    "twelve chunks": chunked_by_twelve,
    "post-norm": post_norm,
    "norms written out": norms_written_out,
}


def over_grid(model: Sampler, z: Tensor) -> Tensor:
    side = round(z.shape[1] ** 0.5)
    return model.grid(z.transpose(1, 2).reshape(len(z), D, side, side)).flatten(2).transpose(1, 2)


def over_grid_of_rows(model: Sampler, z: Tensor) -> Tensor:
    side = round(z.shape[1] ** 0.5)
    return model.grid(z.view(-1, side, side, D).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(z.shape)


def over_windows(model: Sampler, z: Tensor) -> Tensor:
    side = round(z.shape[1] ** 0.5)
    return z.view(-1, side, side, D).cumsum(1).view(z.shape) + z.roll(1, 1).softmax(1)


def before_router(mix: Callable[[Sampler, Tensor], Tensor]) -> Any:
    def block_as(model: Sampler, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        h = h + m[2].unsqueeze(1) * model.attend(block, modulate(block.norm1(h), m[0], m[1]))
        return h + m[5].unsqueeze(1) * block.mlp(modulate(mix(model, block.norm2(h)), m[3], m[4]))

    return block_as


def convolved_stream(model: Sampler, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
    """A convolution with a residual of its own between attention and experts."""
    h = h + m[2].unsqueeze(1) * model.attend(block, modulate(block.norm1(h), m[0], m[1]))
    h = h + over_grid(model, h)
    return h + m[5].unsqueeze(1) * block.mlp(modulate(block.norm2(h), m[3], m[4]))


def convolved_feedforward(model: Sampler, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
    """A feed-forward with a convolution between its products, before the experts."""
    h = h + m[2].unsqueeze(1) * model.attend(block, modulate(block.norm1(h), m[0], m[1]))
    h = h + model.extra(F.silu(over_grid(model, model.extra(block.norm2(h)))))
    return h + m[5].unsqueeze(1) * block.mlp(modulate(block.norm2(h), m[3], m[4]))


def convolved_end(model: Sampler, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
    h = h + m[2].unsqueeze(1) * model.attend(block, modulate(block.norm1(h), m[0], m[1]))
    h = h + over_grid(model, F.silu(model.extra(block.norm2(h))))
    return h + m[5].unsqueeze(1) * block.mlp(modulate(block.norm2(h), m[3], m[4]))


def convolved_queries(model: Sampler, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
    h = h + m[2].unsqueeze(1) * model.attend(block, over_grid(model, block.norm1(h)))
    return h + m[5].unsqueeze(1) * block.mlp(modulate(block.norm2(h), m[3], m[4]))


MIXED = {
    "a convolution over tokens": before_router(lambda model, z: F.conv1d(z.mT, model.kernel, padding=1, groups=D).mT),
    "a convolution over the grid": before_router(over_grid),
    "a convolution over a grid with channels last": before_router(over_grid_of_rows),
    "a mean beside it": before_router(lambda model, z: z + z.mean(1, keepdim=True)),
    "a Fourier transform": before_router(lambda model, z: torch.fft.fft2(z).real),
    "windows": before_router(over_windows),
    "a convolution on the stream": convolved_stream,
    "a convolution in a feed-forward": convolved_feedforward,
    "a convolution that ends a feed-forward": convolved_end,
    "a convolution before queries": convolved_queries,
}
KEYS = ("all", "chosen", "none")


class WithCondition(Sampler):
    """Blocks may read the condition of the step."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.embed_inputs(x, t, y)
        self.condition = c
        for block in self.blocks:
            h = self.block(block, h, block.modulation(c))
        return self.finish(h, c)


def check(model: Sampler, keys_values: tuple[str, ...] = KEYS, idle: int = 0, **counts: int) -> None:
    """`counts` are the regions that must be cached, by kind; `idle` are skipped, since caching them saves nothing."""
    model = model.eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.norm_q.parameters():
            parameter.uniform_(0.5, 1.5)
    noise, labels = make_inputs(model)
    graph = captured(model, noise, torch.ones(2), labels)
    for mode in keys_values:
        loop = graph.loop(keys_values=mode, shared="any")
        regions = loop.compiled.regions
        assert [skipped.reason for skipped in regions.skipped] == [SAVES_NOTHING] * idle
        assert {name: len(getattr(regions, name)) for name in counts} == counts
        assert all(error < 1e-5 for error in loop.notes.errors.values())
        by_token = [a for a in regions.attentions if a.by_token]
        expected = [] if mode == "all" else [shape_of(node) for a in by_token for node in (a.key, a.value)]
        kept = [s for s in loop.compiled.plan.caches if s.name.endswith((".keys", ".values"))]
        assert [torch.Size(s.shape).numel() for s in kept] == [torch.Size(shape).numel() for shape in expected]
        assert_forced_is_the_model(model, graph, loop)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", SPELLED)
def test_spelled_out(name):
    check(Sampler(SPELLED[name]), attentions=2, experts=1, feedforwards=1)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", MASKED)
def test_masked(name):
    check(Sampler(MASKED[name]), attentions=2, experts=1, feedforwards=1)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", GROUPED)
def test_grouped_queries(name):
    check(Sampler(GROUPED[name]), attentions=2, experts=1, feedforwards=1)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", POSITIONED)
def test_positions_and_norms(name):
    check(Sampler(POSITIONED[name]), attentions=2, experts=1, feedforwards=1)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", JOINED)
def test_keys_of_a_text_joined(name):
    check(Sampler(JOINED[name]), attentions=2, experts=1, feedforwards=1)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CROSS)
def test_attention_to_a_text(name):
    check(Sampler(None, CROSS[name]), attentions=4, experts=1, feedforwards=1)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    check(WithCondition(None, BLOCKS[name]), ("chosen",), attentions=2, experts=1, feedforwards=1)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("side", [4, 8])
@pytest.mark.parametrize("name", MIXED)
def test_values_that_mix_tokens(name, side):
    """As many tokens as channels, and not: which dim is which must not depend on it."""
    idle = 2 if name == "a convolution that ends a feed-forward" else 0  # then all of it runs for all tokens
    feedforwards = (3 if "feed-forward" in name else 1) - idle
    model = WithCondition(None, MIXED[name], replace(SIZES, side=side))
    check(model, ("chosen",), idle, attentions=2, experts=1, feedforwards=feedforwards)


def test_what_all_tokens_need_anyway_is_cached_where_nothing_is_recomputed():
    model = WithCondition(None, MIXED["a convolution that ends a feed-forward"]).eval().requires_grad_(False)
    noise, labels = make_inputs(model)
    regions = captured(model, noise, torch.ones(2), labels).loop(budget=0.0).compiled.regions
    assert len(regions.feedforwards) == 3 and not regions.skipped


def test_a_text_that_changes_with_the_timestep():
    check(WithCondition(joined_to_the_time), attentions=2, experts=1, feedforwards=1)


def test_two_attentions_side_by_side():
    """To the picture and to a text, with one projection for their sum."""

    def attend(model: Sampler, block: Block, z: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in model.separate(block, z))
        texts = (x.transpose(1, 2) for x in model.text_of(z))
        own = F.scaled_dot_product_attention(q, k, v)
        return model.project(block, own + 0.7 * F.scaled_dot_product_attention(q, *texts))

    check(Sampler(attend), attentions=4, experts=1)


class LongSkips(Sampler):
    """The first block's result joined with the last one's input, behind a linear, as in U-ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Linear(2 * D, D)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.embed_inputs(x, t, y)
        first = h
        for block in self.blocks:
            h = self.block(block, h, block.modulation(c))
            h = self.join(torch.cat([h, first], -1))
        return self.finish(h, c)


def test_long_skips():
    check(LongSkips(), ("chosen",), attentions=2, experts=1, feedforwards=1)
