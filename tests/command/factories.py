"""What a user would name on the command line."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from examples import families
from tests.models import make_inputs, make_model

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


def sample(model: Any, seed: int) -> torch.Tensor:
    """Four Euler steps."""
    x, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.tensor([1, 2])
    for i in range(4):
        x = x - model(x, torch.full((2,), 1 - i / 4), labels) / 4
    return x


def raising_sample(model: Any, seed: int) -> torch.Tensor:
    raise KeyError("prompt")
