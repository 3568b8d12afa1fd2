"""A cached activation: its value at the last full step and, with a forecast, its slope (first order)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part, Role
from moeca_compile.passes.rewrite.step import Step


@dataclass(frozen=True)
class Cached:
    """The cached value of one node, or of what `value` computes (in the node's shape).

    With `forecast`, the slope is cached too: the change of the value between the last two full steps. A read then
    gives cached value + distance * slope. The distance is how far this step's timestep is from that of the last full
    step, in units of the interval between the last two full steps.

    Attributes:
        name: name of the cached tensor; the slope's is `name`.slope.
        node: the node whose value is replaced.
        part: the part of the schedule that refreshes it.
        forecast: whether to extrapolate.
        dtype: dtype of the cached tensors; None for the node's own.
        value: computes what is cached; None for the node's own value.
        before: a node that `value` reads besides `node`.
    """

    name: str
    node: fx.Node
    part: Part
    forecast: bool
    dtype: torch.dtype | None = None
    value: Callable[[Step], Tensor] | None = None
    before: fx.Node | None = None

    def specs(self) -> list[CacheSpec]:
        roles = {self.name: Role.ACTIVATION} | ({self._slope_name: Role.SLOPE} if self.forecast else {})
        dtype = self.dtype or self._compute_dtype
        return [CacheSpec(name, shape_of(self.node), dtype, role) for name, role in roles.items()]

    def reads(self) -> list[fx.Node]:
        return [self.node] if self.before is None else [self.node, self.before]

    def store(self, step: Step) -> None:
        """Cache this step's value and, with a forecast, its change since the previous full step."""
        fresh = self.value(step) if self.value is not None else step[self.node]
        if self.forecast:
            had_previous = step.had_full_step(self.part).to(fresh.dtype)
            step.updates[self._slope_name] = self._to_cache((fresh - self._cached(step)) * had_previous)
        step.updates[self.name] = self._to_cache(fresh)

    def read(self, step: Step) -> Tensor:
        """The cached value, extrapolated to this step where there is a forecast."""
        if not self.forecast:
            return self._cached(step)
        return self._cached(step) + self._advance(step)

    def refresh(self, step: Step, chosen: Tensor, rows: Tensor, valid: Tensor) -> None:
        """Update the tokens `chosen` (B, C) where `valid`, so that a read at this step gives `rows` there."""
        if self.forecast:
            rows = rows - step.take(self.node, self._advance(step), chosen)
        updated = step.put(self.node, self._cached(step), chosen, rows, valid)
        step.updates[self.name] = self._to_cache(updated)

    def _advance(self, step: Step) -> Tensor:
        slope = step.current(self._slope_name).to(self._compute_dtype)
        return slope * step.forecast_distance(self.part).to(slope.dtype)

    def _cached(self, step: Step) -> Tensor:
        return step.current(self.name).to(self._compute_dtype)

    def _to_cache(self, value: Tensor) -> Tensor:
        return value.to(self.dtype or self._compute_dtype).contiguous()

    @property
    def _slope_name(self) -> str:
        return f"{self.name}.slope"

    @property
    def _compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.node.meta["val"].dtype
        return dtype
