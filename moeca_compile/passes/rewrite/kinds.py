"""Kinds of steps, the parts of a model that they refresh, and the tensors that are cached between steps."""

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
        """Its row among the forecast weights; WHOLE is refreshed together with attention."""
        return 1 if self is Part.EXPERTS else 0


class Role(Enum):
    """What a cached tensor holds."""

    ACTIVATION = "activation"
    """Values of the model that a cache step uses in place of computing them."""
    ROUTING = "routing"
    """Expert ids, weights, pool positions and histories: which branches the activations belong to."""
    STATISTIC = "statistic"
    """Statistics that choose branches: norms, activation counts, ages."""


@dataclass(frozen=True)
class CacheSpec:
    """One cached tensor. Its bytes are known before anything runs.

    Attributes:
        name, shape, dtype, role: what it is and holds.
        part: the part of the schedule whose steps replace it without reading it; None where the new value depends on
            the old one, or where nothing is known of it.
        ring: the name under which such a step stores its new value. Several tensors with one ring are its slots, and
            the value goes to the oldest of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role = Role.ACTIVATION
    part: Part | None = None
    ring: str = ""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def slot_names(ring: str, slots: int) -> tuple[str, ...]:
    """The names of a ring's tensors; a ring of one slot has its own name."""
    return (ring,) if slots == 1 else tuple(f"{ring}.{number}" for number in range(slots))


def ring_specs(
    ring: str, slots: int, shape: tuple[int, ...], dtype: torch.dtype, part: Part, role: Role = Role.ACTIVATION
) -> list[CacheSpec]:
    """The tensors that hold the values of the last `slots` steps that computed `part`."""
    return [CacheSpec(name, shape, dtype, role, part, ring) for name in slot_names(ring, slots)]


@dataclass(frozen=True)
class StepKind:
    """What a step computes. One compiled graph serves all steps of a kind.

    Attributes:
        attention, experts: whether that part runs as in the model (and fills its caches).
        capacity: the most tokens of a sample that a cache step recomputes; 0 where it recomputes none. Counted in
            the main stream; in other streams the same fraction of their tokens.
        forced: recompute everything through the caches (validation only).
        group: the replacements whose values a cache step takes from caches, where a policy has several groups of them
            (Replacement.group).
        probe: computes nothing but what decides about the step (passes.rewrite.probe).
    """

    attention: bool = True
    experts: bool = True
    capacity: int = 0
    forced: bool = False
    group: str = ""
    probe: bool = False

    @property
    def full(self) -> bool:
        return self.attention and self.experts

    def computes(self, part: Part) -> bool:
        """Whether the part runs as in the model."""
        return {Part.ATTENTION: self.attention, Part.EXPERTS: self.experts, Part.WHOLE: self.full}[part]

    @property
    def name(self) -> str:
        if self.probe:
            return "probe"
        if self.full:
            return "full"
        fresh = "+attention" if self.attention else "+experts" if self.experts else ""
        return (
            f"cache{fresh}"
            + (f"[{self.capacity}]" if self.capacity else "")
            + (f" {self.group}" if self.group else "")
        )


STEP_SCALARS = CacheSpec("step_scalars", (2,), torch.float64, Role.STATISTIC)
"""The numbers of a cache step where these decide how many tokens it recomputes (Policy.share_at): their share of all,
and the number of the step. The host writes them before the step, which only reads them. Not before a step that
recomputes none."""

REUSING = StepKind(attention=False, experts=False)
"""A cache step that recomputes nothing."""

PROBE = StepKind(attention=False, experts=False, probe=True)
"""What decides about a step, computed by itself."""

COUNTERS = ("branches", "matched", "recomputed", "dropped", "needed")
"""What a layer counts on a cache step: its branches, those matched, those recomputed, tokens dropped past the
capacity, and tokens that needed recomputation."""
