"""Which parts of the model a step computes anew. Step numbers alone decide this, on the host."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Set
from dataclasses import dataclass

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.rewrite.kinds import Part


@dataclass(frozen=True)
class RefreshPlan:
    """Which parts of the model a step computes anew; the others come from caches."""

    attention: bool
    experts: bool


EVERYTHING = RefreshPlan(attention=True, experts=True)


@dataclass(frozen=True)
class DueSteps:
    """The steps of a generation, numbered from 0, at which a part is due: those listed, else every `every`-th."""

    every: int = 1
    listed: tuple[int, ...] | None = None
    """In ascending order."""

    def within(self, last: int, number: int) -> bool:
        """Whether any step after `last` and up to `number` is due. Takes as long for 10,000 steps as for one."""
        return self._up_to(number) > self._up_to(last)

    def and_of(self, other: DueSteps) -> DueSteps:
        """The steps that are due in both."""
        if self.listed is not None:
            return DueSteps(listed=tuple(step for step in self.listed if other.within(step - 1, step)))
        return other.and_of(self) if other.listed is not None else DueSteps(math.lcm(self.every, other.every))

    def _up_to(self, number: int) -> int:
        """How many steps are due from 0 to `number`."""
        return number // self.every + 1 if self.listed is None else bisect_right(self.listed, number)


class Schedule:
    """When each part of the model is due.

    Each part has its own interval (`attention_every`, `experts_every`). Without one, it follows `full_steps` if that
    is set, else `full_every`. If Part.WHOLE is among the `cached` parts, only full steps compute anything anew.
    """

    def __init__(self, config: MoecaConfig, cached: Set[Part]) -> None:
        attention, experts = (_due_steps(config, every) for every in (config.attention_every, config.experts_every))
        both = attention.and_of(experts)
        self.attention, self.experts = (both, both) if Part.WHOLE in cached else (attention, experts)

    def parts_to_refresh(self, attention_at: int, experts_at: int, number: int) -> RefreshPlan:
        """What step `number` computes anew.

        Args:
            attention_at, experts_at: the step that last computed each part, -1 where none has. What was due since
                then is due now, also if it was due at a step at which this stream was not called.
        """
        return RefreshPlan(self.attention.within(attention_at, number), self.experts.within(experts_at, number))


def _due_steps(config: MoecaConfig, interval: int | None) -> DueSteps:
    if interval is not None:
        return DueSteps(interval)
    return DueSteps(config.full_every) if config.full_steps is None else DueSteps(listed=config.full_steps)
