"""What the families share besides the parts of examples/dit.py: sizes by name, and random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from examples.dit import DiffusionTransformer, Sizes


@dataclass(frozen=True)
class Family:
    """A kind of model: its published sizes by name, and small ones for tests with the same structure."""

    model: Callable[[Sizes], DiffusionTransformer]
    published: Mapping[str, Sizes]
    reduced: Sizes


def randomize(model: nn.Module, seed: int) -> None:
    """Set random weights by the seed. adaLN gates are not zero, unlike before training, so every block matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter.shape[1:].numel()
        spread = max(1, fan_in) ** -0.5 if parameter.dim() > 1 else 0.1
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
