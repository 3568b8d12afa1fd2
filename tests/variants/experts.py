"""Experts: what one of them computes of its rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dit import Mlp, SwiGLU


class OneLinear(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)).square()


class Normed(nn.Module):
    """A norm inside, with learned weights."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.norm = nn.LayerNorm(hidden)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.norm(self.up(x))))


class RootMeanSquared(nn.Module):
    """An RMS norm on the way in, spelled out."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(width))
        self.body = SwiGLU(width, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale)


class WithExtra(nn.Module):
    """An expert of a row and a further row of its token (a timestep embedding, a context)."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.shift = body, nn.Linear(width, width)

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        return self.body(x + self.shift(extra))


BODIES: dict[str, type[nn.Module]] = {
    "swiglu": SwiGLU,
    "mlp": Mlp,
    "linear": OneLinear,
    "normed": Normed,
    "rms": RootMeanSquared,
}
