"""What a user would name on the command line."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from examples import families
from tests.models import SMALL, TinyDiTMoE, make_inputs, make_model

NUMBER = 3


def model() -> nn.Module:
    return make_model()


def inputs(model: Any) -> tuple[Any, ...]:
    noise, labels = make_inputs(model)
    return noise, torch.ones(len(noise)), labels


def by_name(model: Any) -> dict[str, Any]:
    noise, t, labels = inputs(model)
    return {"x": noise, "t": t, "y": labels}


def with_inputs() -> tuple[nn.Module, tuple[Any, ...]]:
    made = make_model()
    return made, inputs(made)


def dense() -> tuple[nn.Module, tuple[Any, ...]]:
    """On whatever device is the default."""
    device = str(torch.get_default_device())
    made = families.reduced("DiT", device=device)
    return made, families.inputs_for(made)


def experts() -> tuple[nn.Module, tuple[Any, ...]]:
    device = str(torch.get_default_device())
    made = families.reduced("DSMoE", device=device)
    return made, families.inputs_for(made)


class Breaking(nn.Module):
    """Its graph breaks after the model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = self.inner(x, t, y)
        return out * out.sum().item()


def breaking() -> tuple[nn.Module, tuple[Any, ...]]:
    made = Breaking()
    return made, inputs(made.inner)


def small() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Linear(2, 2), (torch.ones(1, 2),)


def raising() -> nn.Module:
    raise ValueError("no checkpoint")


def raising_inputs(model: Any) -> Any:
    raise KeyError("labels")


def too_few(model: Any) -> Any:
    return (inputs(model)[0],)


def one_tensor(model: Any) -> Any:
    return inputs(model)[0]


class Scaled(TinyDiTMoE):
    """Its graph breaks after the model. It calls the method that it overrides."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, *, power: int = 2) -> torch.Tensor:
        out = super().forward(x, t, y)
        return out * out.abs().mean().item() ** power


class Wrapped(nn.Module):
    """A model within another module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled(SMALL)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.inner(x, t, y)


def wrapped() -> nn.Module:
    torch.manual_seed(0)
    return Wrapped()


def sample(model: Any, seed: int) -> torch.Tensor:
    """Eight Euler steps from noise of this seed."""
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1, 8, 8, generator=generator).to(like)
    labels = torch.tensor([3, 7], device=like.device)
    for step in range(8):
        x = x - model(x, torch.full((2,), 1 - step / 8, dtype=like.dtype, device=like.device), labels) / 8
    return x


def two_seeds(model: Any, seed: int, other: int) -> torch.Tensor:
    return sample(model, seed + other)


def sample_another(model: Any, seed: int) -> torch.Tensor:
    return sample(make_model(), seed)


def sample_list(model: Any, seed: int) -> Any:
    return [sample(model, seed)]


def sample_tokens(model: Any, seed: int) -> torch.Tensor:
    return sample(model, seed).flatten(2)


def sample_nan(model: Any, seed: int) -> torch.Tensor:
    """Not finite, as in a dtype that overflows."""
    return sample(model, seed) * float("inf")


buffer = torch.zeros(2, 1, 8, 8)


def sample_into_a_buffer(model: Any, seed: int) -> torch.Tensor:
    """Each call returns the same tensor, filled again."""
    return buffer.copy_(sample(model, seed))


calls = 0


def sample_anew(model: Any, seed: int) -> torch.Tensor:
    """Another result at each call."""
    global calls
    calls += 1
    return sample(model, seed + calls)


def sample_raising(model: Any, seed: int) -> torch.Tensor:
    raise KeyError("vae")


def tensor() -> torch.Tensor:
    return torch.ones(1)
