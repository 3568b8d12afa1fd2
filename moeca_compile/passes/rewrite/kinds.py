"""Kinds of steps, the parts of a model that a kind computes anew, and the tensors that are cached between steps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch


class Part(Enum):
    """A part of the model with a refresh interval of its own. WHOLE: only full steps refresh it."""

    ATTENTION = "attention"
    EXPERTS = "experts"
    WHOLE = "whole"

    @property
    def row(self) -> int:
        """Its row among the forecast coefficients; WHOLE is refreshed together with attention."""
        return 1 if self is Part.EXPERTS else 0


class Role(Enum):
    """What a cached tensor is to the step that reads it."""

    ACTIVATION = "activation"
    """Values of the model that a cache step uses in place of computing them."""
    SLOPE = "slope"
    """How an activation changed between the last two full steps."""
    ROUTING = "routing"
    """Expert ids, weights and places: which branches the activations belong to."""
    STATISTIC = "statistic"
    """What decisions go by: norms, activation counts, ages."""


@dataclass(frozen=True)
class CacheSpec:
    """One cached tensor: its name, shape, dtype and role. Its bytes are known before anything runs."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role = Role.ACTIVATION

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class StepKind:
    """What a step computes anew. One compiled graph serves all steps of a kind.

    Attributes:
        attention, experts: whether that part runs as the model has it (and fills its caches).
        capacity: chosen tokens per sample of a cache step, at most; 0 where nothing is recomputed. It counts in the
            main stream; other streams have the same share of theirs.
        forced: recompute everything through the cache's own path (validation only).
    """

    attention: bool = True
    experts: bool = True
    capacity: int = 0
    forced: bool = False

    @property
    def full(self) -> bool:
        return self.attention and self.experts

    def computes(self, part: Part) -> bool:
        """Whether the part runs as the model has it."""
        return {Part.ATTENTION: self.attention, Part.EXPERTS: self.experts, Part.WHOLE: self.full}[part]

    @property
    def name(self) -> str:
        if self.full:
            return "full"
        fresh = "+attention" if self.attention else "+experts" if self.experts else ""
        return f"cache{fresh}" + (f"[{self.capacity}]" if self.capacity else "")


COUNTERS = ("branches", "matched", "recomputed", "dropped", "needed")
"""What a layer counts on a cache step: its branches, those matched, those recomputed, tokens dropped past the
capacity, and tokens that needed recomputation."""
