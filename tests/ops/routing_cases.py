"""Forms of a router's choice that the tests of `choose_experts` share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """The arguments of `choose_experts` after the logits and the bias, and for how many experts."""

    experts: int
    k: int
    scores: str = "softmax"
    groups: int = 1
    kept_groups: int = 1
    best_of: int = 1
    fill: float = 0.0
    gathered: bool = False
    norm: str = "none"
    eps: float = 0.0
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    biased: bool = False

    def arguments(self) -> tuple[Any, ...]:
        return (
            *(self.k, self.scores, self.groups, self.kept_groups, self.best_of, self.fill, self.gathered, self.norm),
            *(self.eps, self.scale, self.dtype, self.weight_dtype),
        )


CASES = {
    "softmax": Choice(8, 2),
    "one of few": Choice(4, 1),
    "experts that are no power of two": Choice(6, 3, norm="sum"),
    "the most": Choice(256, 8, norm="sum"),
    "48 experts": Choice(48, 5, "sigmoid", gathered=True, norm="sum", eps=1e-20, scale=2.5, biased=True),
    "all of them": Choice(5, 5),
    "softmax of the chosen": Choice(12, 4, "none", norm="softmax"),
    "weights with the bias": Choice(12, 4, "sigmoid", norm="sum", biased=True),
    "DSMoE": Choice(
        *(16, 2, "sigmoid", 2, 1), best_of=2, gathered=True, norm="sum", eps=1e-20, scale=2.0, biased=True
    ),
    "DeepSeek-V3": Choice(*(256, 8, "sigmoid", 8, 4, 2, -math.inf, True, "sum", 1e-20, 2.5), biased=True),
    "DeepSeek-V2": Choice(160, 6, "softmax", 8, 3, scale=16.0),
    "groups of three": Choice(15, 4, "softmax", 5, 2, 2, gathered=True),
    "more than the groups hold": Choice(12, 5, "none", 4, 1, 1, -1.0),
}
"""The routers of the examples, of tests/variants and of published language models, and odd sizes."""


def make_inputs(tokens: int, choice: Choice, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor | None]:
    """Logits and the bias, if there is one."""
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, choice.experts, generator=generator)
    bias = 0.2 * torch.randn(choice.experts, generator=generator)
    return logits.to(device, dtype), bias.to(device) if choice.biased else None
