"""A small DiT-MoE as people write them, for tests, from the parts of examples/dit.py.

Every second block is a MoE with a shared expert and sorted-segment dispatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from examples import dit
from examples.dit import Attention, Block, DiffusionTransformer, Mlp, Router, TimestepEmbedder


@dataclass(frozen=True)
class Sizes(dit.Sizes):
    """Sizes of a TinyDiTMoE."""

    width: int = 32
    depth: int = 4
    heads: int = 4
    side: int = 8
    channels: int = 1
    classes: int = 10
    experts: int = 6
    top_k: int = 2
    expert_width: int = 48


SMALL = Sizes(width=16, depth=2, heads=2, experts=3, expert_width=16)
"""The smallest that has all parts, for tests that compile several times."""


class MoE(dit.MoE):
    def __init__(self, sizes: Sizes) -> None:
        router = Router(sizes.width, sizes.experts, sizes.top_k, scale=1.5)
        super().__init__(router, sizes.expert_width, shared_hidden=2 * sizes.expert_width)


class CappedAttention(Attention):
    """Scores go through a tanh, which scaled_dot_product_attention cannot say."""

    def forward(self, x):
        q, k, v = self.split_heads(x)
        weights = (20 * torch.tanh(q @ k.mT / 20)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(x.shape))


class TinyDiTMoE(DiffusionTransformer):
    """forward(x (B, C, H, W), t (B,) in [0, 1], y (B,)) -> (B, C, H, W)."""

    sizes: Sizes

    def __init__(self, sizes: Sizes | None = None) -> None:
        sizes = sizes or Sizes()
        feedforwards = partial(Mlp, sizes.width, 4 * sizes.width), partial(MoE, sizes)

        def block(index: int) -> nn.Module:
            return Block(sizes.width, sizes.heads, feedforwards[index % 2], sizes.grid)

        time = partial(TimestepEmbedder, features=sizes.width, scale=1000.0)
        super().__init__(sizes, block, added_positions=False, time=time)


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
