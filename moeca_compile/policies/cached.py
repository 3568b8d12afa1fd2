"""A cached activation, held as its value at the last full step or as a value and a slope (first-order forecast)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.rewrite.step import CacheSpec, Step


@dataclass(frozen=True)
class Cached:
    """The cached value of one node.

    With `forecast`, `slope` is the change between the last two full steps and a read gives value + reach * slope,
    where reach is the distance from the last full step in units of the interval between the two.
    """

    name: str
    node: fx.Node
    part: int
    forecast: bool
    dtype: torch.dtype | None = None

    def specs(self) -> list[CacheSpec]:
        names = [self.name, self._slope_name] if self.forecast else [self.name]
        return [CacheSpec(name, shape_of(self.node), self.dtype or self._compute_dtype) for name in names]

    def store(self, step: Step, fresh: Tensor) -> None:
        """After a full step: keep the fresh value, and how it changed since the full step before."""
        if self.forecast:
            had_previous = step.clock[self.part, 1].to(fresh.dtype)
            step.updates[self._slope_name] = self._kept((fresh - self._value(step)) * had_previous)
        step.updates[self.name] = self._kept(fresh)

    def read(self, step: Step) -> Tensor:
        """The value to use at this step in place of the node's own."""
        if not self.forecast:
            return self._value(step)
        return self._value(step) + self._advance(step)

    def refresh(self, step: Step, chosen: Tensor, rows: Tensor, valid: Tensor) -> None:
        """Replace the rows `chosen` (B, C), where `valid`, so that a read at this step gives `rows` there."""
        if self.forecast:
            rows = rows - step.take(self.node, self._advance(step), chosen)
        updated = step.put(self.node, self._value(step), chosen, rows, valid)
        step.updates[self.name] = self._kept(updated)

    def _advance(self, step: Step) -> Tensor:
        slope = step.current(self._slope_name).to(self._compute_dtype)
        return slope * step.clock[self.part, 0].to(slope.dtype)

    def _value(self, step: Step) -> Tensor:
        return step.current(self.name).to(self._compute_dtype)

    def _kept(self, value: Tensor) -> Tensor:
        return value.to(self.dtype or self._compute_dtype).contiguous()

    @property
    def _slope_name(self) -> str:
        return f"{self.name}.slope"

    @property
    def _compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.node.meta["val"].dtype
        return dtype
