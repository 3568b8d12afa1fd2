"""A cached activation: its value at the last full step or, with a forecast, at the last few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moeca_compile.ops.ring import moved_to, weighted_sum
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part, ring_specs, slot_names
from moeca_compile.passes.rewrite.step import Step


@dataclass(frozen=True)
class Cached:
    """The cached value of one node, or of what `value` computes (in the node's shape).

    With several `slots`, the values of as many full steps are cached in a ring, and a read gives their weighted sum,
    with the weights of this step.

    Attributes:
        name: name of the cached tensor, or of the ring.
        node: the node whose value is replaced.
        part: the part of the schedule that refreshes it.
        slots: how many of the last full steps' values are kept; one is held as it is.
        dtype: dtype of the cached tensors; None for the node's own.
        value: computes what is cached; None for the node's own value.
        before: a node that `value` reads besides `node`.
    """

    name: str
    node: fx.Node
    part: Part
    slots: int = 1
    dtype: torch.dtype | None = None
    value: Callable[[Step], Tensor] | None = None
    before: fx.Node | None = None

    def specs(self) -> list[CacheSpec]:
        dtype = self.dtype or self._compute_dtype
        return ring_specs(self.name, self.slots, shape_of(self.node), dtype, self.part)

    def reads(self) -> list[fx.Node]:
        return [self.node] if self.before is None else [self.node, self.before]

    def store(self, step: Step) -> None:
        """Cache this step's value."""
        fresh = self.value(step) if self.value is not None else step[self.node]
        step.updates[self.name] = self._to_cache(fresh)

    def read(self, step: Step) -> Tensor:
        """The cached value, extrapolated to this step where there is a forecast."""
        slots = [step.current(name) for name in self._slots]
        value = weighted_sum(slots, self._weights(step)) if self.slots > 1 else slots[0]
        return value.to(self._compute_dtype)

    def refresh(self, step: Step, chosen: Tensor, rows: Tensor, valid: Tensor) -> None:
        """Update the tokens `chosen` (B, C) where `valid`, so that a read at this step gives `rows` there."""
        slots = [step.current(name) for name in self._slots]
        before = [step.take(self.node, slot, chosen) for slot in slots]
        moved = moved_to(rows, before, self._weights(step)) if self.slots > 1 else [rows]
        for name, slot, value in zip(self._slots, slots, moved, strict=True):
            step.updates[name] = step.put(self.node, slot, chosen, value.to(slot.dtype), valid)

    def _weights(self, step: Step) -> Tensor:
        """(K,) the weights of the slots: every full step computed all of the value."""
        return step.forecast_weights(self.part)[-1]

    def _to_cache(self, value: Tensor) -> Tensor:
        return value.to(self.dtype or self._compute_dtype).contiguous()

    @property
    def _slots(self) -> tuple[str, ...]:
        return slot_names(self.name, self.slots)

    @property
    def _compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.node.meta["val"].dtype
        return dtype
