"""DiT-MoEs of more than one token stream, for tests: picture and text attend together, apart or in one sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dit import Mlp, modulate, rotate
from tests.models import MoE, Sizes, TinyDiTMoE

SIZES = Sizes(depth=2, width=16, heads=2, experts=4, expert_width=8)
WIDTH, TEXT = SIZES.width, 5


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (SIZES.heads, -1)).transpose(1, 2)


class Branch(nn.Module):
    """What one stream has of its own in a block."""

    def __init__(self, moe: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp: nn.Module = MoE(SIZES) if moe else Mlp(WIDTH, 4 * WIDTH)
        self.adaln = nn.Linear(WIDTH, 6 * WIDTH)

    def heads(self, h: Tensor, m: tuple[Tensor, ...]) -> list[Tensor]:
        return [split_heads(part) for part in self.qkv(modulate(self.norm(h), m[0], m[1])).chunk(3, -1)]

    def feed(self, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        return h + m[5].unsqueeze(1) * self.mlp(modulate(self.norm(h), m[3], m[4]))


class Streams(TinyDiTMoE):
    """forward(x (B, C, H, W), t (B,), y (B,), text (B, TEXT, WIDTH)) -> (B, C, H, W); two dense or MoE blocks."""

    picture_moe, text_moe = True, False

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(SIZES)
        self.picture = nn.ModuleList(Branch(self.picture_moe) for _ in range(2))
        self.words = nn.ModuleList(Branch(self.text_moe) for _ in range(2))
        self.positions = nn.Parameter(torch.randn(SIZES.tokens + TEXT, 4).repeat(1, 2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor) -> Tensor:
        h, c = self.embed_inputs(x, t, y)
        return self.finish(self.run(h, text, F.silu(c)), c)

    def run(self, h: Tensor, text: Tensor, c: Tensor) -> Tensor:
        for picture, words in zip(self.picture, self.words, strict=True):
            h, text = self.block(picture, words, h, text, c)
        return h + text.mean(1, keepdim=True)

    def block(self, picture: Branch, words: Branch, h: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """A joint block: one attention over both streams, then a feed-forward each."""
        m, n = picture.adaln(c).chunk(6, 1), words.adaln(c).chunk(6, 1)
        q, k, v = (torch.cat(pair, 2) for pair in zip(picture.heads(h, m), words.heads(text, n), strict=True))
        q, k = (rotate(z, self.positions.cos(), self.positions.sin()) for z in (q, k))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        ours, theirs = out.split([h.shape[1], text.shape[1]], dim=1)
        h = h + m[2].unsqueeze(1) * picture.proj(ours)
        text = text + n[2].unsqueeze(1) * words.proj(theirs)
        return picture.feed(h, m), words.feed(text, n)


class TextFirst(Streams):
    """The text before the picture, cut off by slices."""

    def block(self, picture, words, h, text, c):
        m, n = picture.adaln(c).chunk(6, 1), words.adaln(c).chunk(6, 1)
        q, k, v = (torch.cat(pair, 2) for pair in zip(words.heads(text, n), picture.heads(h, m), strict=True))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        text = text + n[2].unsqueeze(1) * words.proj(out[:, :TEXT])
        h = h + m[2].unsqueeze(1) * picture.proj(out[:, TEXT:])
        return picture.feed(h, m), words.feed(text, n)


class ExpertsForBoth(Streams):
    """Text tokens have experts of their own."""

    text_moe = True


class TextEndsEarly(Streams):
    """Nobody reads what the last joint attention gives the text."""

    def run(self, h, text, c):
        h, text = self.block(self.picture[0], self.words[0], h, text, c)
        picture, words = self.picture[1], self.words[1]
        m, n = picture.adaln(c).chunk(6, 1), words.adaln(c).chunk(6, 1)
        q, k, v = (torch.cat(pair, 2) for pair in zip(picture.heads(h, m), words.heads(text, n), strict=True))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, : h.shape[1]]
        return picture.feed(h + m[2].unsqueeze(1) * picture.proj(out), m)


class SingleStream(Streams):
    """All tokens in one sequence, as in Flux's single blocks."""

    def run(self, h, text, c):
        z = torch.cat([text, h], 1)
        for block in self.picture:
            z = self.single(block, z, c)
        return z[:, TEXT:]

    def single(self, block: Branch, z: Tensor, c: Tensor) -> Tensor:
        m = block.adaln(c).chunk(6, 1)
        out = F.scaled_dot_product_attention(*block.heads(z, m)).transpose(1, 2).flatten(2)
        return block.feed(z + m[2].unsqueeze(1) * block.proj(out), m)


class DoubleThenSingle(SingleStream):
    """A joint block, then one on the joined sequence."""

    def run(self, h, text, c):
        h, text = self.block(self.picture[0], self.words[0], h, text, c)
        return self.single(self.picture[1], torch.cat([h, text], 1), c)[:, : SIZES.tokens]


class TokensForABlock(SingleStream):
    """Every block sees tokens of its own beside the stream's, which are cut off after it."""

    def run(self, h, text, c):
        for block in self.picture:
            h = self.single(block, torch.cat([h, text * (1 + c[:, None])], 1), c)[:, : SIZES.tokens]
        return h


class ExpertsForThePicture(SingleStream):
    """One sequence, whose feed-forward is a MoE layer for the picture and dense for the text."""

    def single(self, block, z, c):
        m = block.adaln(c).chunk(6, 1)
        out = F.scaled_dot_product_attention(*block.heads(z, m)).transpose(1, 2).flatten(2)
        z = z + m[2].unsqueeze(1) * block.proj(out)
        inner = modulate(block.norm(z), m[3], m[4])
        fed = torch.cat([self.words[0].mlp(inner[:, :TEXT]), block.mlp(inner[:, TEXT:])], 1)
        return z + m[5].unsqueeze(1) * fed


class DenseBlocksBetween(Streams):
    """A dense single-stream block after the joint ones: its tokens follow the last MoE layer."""

    def run(self, h, text, c):
        h, text = self.block(self.picture[0], self.words[0], h, text, c)
        z = torch.cat([text, h], 1)
        m = self.words[1].adaln(c).chunk(6, 1)
        out = F.scaled_dot_product_attention(*self.words[1].heads(z, m)).transpose(1, 2).flatten(2)
        return self.words[1].feed(z + m[2].unsqueeze(1) * self.words[1].proj(out), m)[:, TEXT:]


class WithGuidance(Streams):
    """A guidance scale, embedded as the timestep is."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor, guidance: Tensor) -> Tensor:  # type: ignore[override]
        h, c = self.embed_inputs(x, t, y)
        c = c + self.time(guidance)
        return self.finish(self.run(h, text, F.silu(c)), c)


def make_text(seed: int = 3) -> Tensor:
    return torch.randn(2, TEXT, WIDTH, generator=torch.Generator().manual_seed(seed))
