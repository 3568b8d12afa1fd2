"""What a model knows besides its picture: timestep, label or text; and how it reaches the blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples.dit import TimestepEmbedder

CLASSES, TEXT_WIDTH = 5, 12


@dataclass(frozen=True)
class Modulation:
    """adaLN's chunks of one sub-layer, (B, 1, width) each, None where the model has none."""

    shift: Tensor | None = None
    scale: Tensor | None = None
    gate: Tensor | None = None


class Condition(nn.Module):
    """Timestep (B,) or scalar, and a class label (B,), a text vector (B, TEXT_WIDTH) or nothing -> (B, width)."""

    def __init__(self, label: str, width: int) -> None:
        super().__init__()
        self.time = TimestepEmbedder(width, features=width, scale=1000.0)
        if label == "class":
            self.embed: nn.Module = nn.Embedding(CLASSES, width)
        elif label == "text":
            self.embed = nn.Linear(TEXT_WIDTH, width)

    def forward(self, t: Tensor, y: Tensor | None, batch: int) -> Tensor:
        # Integer timesteps count from 1000, others from 1.
        t = (t / 1000 if not t.is_floating_point() else t).expand(batch)
        c = self.time(t)
        return c if y is None else c + self.embed(y)


class AdaLN(nn.Module):
    """c (B, width) -> the modulations of attention and feed-forward.

    chunks: 12 adds those of a text stream, 6 are shift, scale and gate twice, 4 lack the shifts, 2 are one shift
        and scale for both, without gates, 0 is no adaLN
    gate: "plain", "tanh" or "clamp"
    """

    def __init__(self, chunks: int, gate: str, width: int) -> None:
        super().__init__()
        self.chunks, self.gate = chunks, gate
        if chunks:
            self.linear = nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))

    def forward(self, c: Tensor) -> tuple[Modulation, ...]:
        if self.chunks == 0:
            return Modulation(), Modulation()
        if self.chunks == 12:
            parts = self.linear(c)[:, None].chunk(12, dim=-1)
            return tuple(Modulation(a, b, self.limited(g)) for a, b, g in zip(*[iter(parts)] * 3, strict=True))
        parts = tuple(part.unsqueeze(1) for part in self.linear(c).chunk(self.chunks, dim=1))
        if self.chunks == 6:
            return Modulation(*parts[:2], self.limited(parts[2])), Modulation(*parts[3:5], self.limited(parts[5]))
        if self.chunks == 4:
            return Modulation(None, parts[0], self.limited(parts[1])), Modulation(
                None, parts[2], self.limited(parts[3])
            )
        return Modulation(*parts), Modulation(*parts)

    def limited(self, gate: Tensor) -> Tensor:
        if self.gate == "tanh":
            return gate.tanh()
        return gate.clamp(-0.5, 0.5) if self.gate == "clamp" else gate


def modulate(x: Tensor, by: Modulation) -> Tensor:
    if by.scale is not None:
        x = x * (1 + by.scale)
    return x if by.shift is None else x + by.shift


def joined(stream: Tensor, branch: Tensor, gate: Tensor | None, stream_first: bool) -> Tensor:
    """The residual addition, its operands in either order."""
    if gate is not None:
        branch = gate * branch if stream_first else branch * gate
    return stream + branch if stream_first else branch + stream


def texts(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Text tokens (B, length, TEXT_WIDTH)."""
    return torch.randn(batch, length, TEXT_WIDTH, generator=generator)
