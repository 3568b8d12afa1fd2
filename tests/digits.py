"""A digits model that compiles in seconds, for the examples and benchmarks that are started with a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from examples.digits.testbed import DigitsConfig
from examples.testbed.checkpoint import save_model
from examples.testbed.model import Config, MoEDiT


def tiny_digits(folder: Path, **sizes: int) -> Path:
    """A checkpoint of a small digits model with random weights, none of them zero."""
    save_model(untrained(DigitsConfig(depth=2, heads=2, **sizes)), folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


def untrained(config: Config) -> MoEDiT:
    """A testbed's model with random weights, none of them zero."""
    torch.manual_seed(0)
    model = MoEDiT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():  # adaLN-zero would hide every branch
            nn.init.normal_(parameter, std=0.1)
    return model
