"""Which parts of the model a step computes anew. Step numbers alone decide this, on the host."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Set
from dataclasses import dataclass
from functools import lru_cache

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.rewrite.kinds import Part
from moeca_compile.policies.policy import CacheStepAt
from moeca_compile.tuned_file import Calibrated, apart


@dataclass(frozen=True)
class RefreshPlan:
    """Which parts of the model a step computes anew; the others come from caches, as far as the group says."""

    attention: bool
    experts: bool
    group: str = ""
    """The group of replacements that a cache step uses (Policy.group_at)."""
    share: float | None = None
    """The share of the tokens that a cache step recomputes, where step numbers say that (Policy.share_at)."""


EVERYTHING = RefreshPlan(attention=True, experts=True)
NOTHING = RefreshPlan(attention=False, experts=False)


@dataclass(frozen=True)
class DueSteps:
    """The steps of a generation, numbered from 0, at which a part is due: those listed, else every `every`-th."""

    every: int = 1
    listed: tuple[int, ...] | None = None
    """In ascending order."""
    planned: int | None = None
    """How many steps the list is for: from then on every `every`-th is due, the first at once. None if for any."""

    def within(self, last: int, number: int) -> bool:
        """Whether any step after `last` and up to `number` is due. Takes as long for 10,000 steps as for one."""
        return self._up_to(number) > self._up_to(last)

    def and_of(self, other: DueSteps) -> DueSteps:
        """The steps that are due in both."""
        every = math.lcm(self.every, other.every)
        if self.listed is not None:
            both = tuple(step for step in self.listed if other.within(step - 1, step))
            return DueSteps(every, both, self.planned)
        return other.and_of(self) if other.listed is not None else DueSteps(every)

    def phase(self, step: float) -> float:
        """The place of a step among the due ones: i for that numbered i from 0, and evenly in between.

        Past a list it ends where the generation does, if that is known.
        """
        if self.listed is None:
            return step / self.every
        if self.planned is not None and step >= self.planned:
            return len(self.listed) + (step - self.planned) / self.every
        place = max(bisect_right(self.listed, step) - 1, 0)
        end = math.inf if self.planned is None else self.planned
        start, end = (*self.listed, end)[place : place + 2]
        return place + (step - start) / (end - start)

    @property
    def mean_gap(self) -> float:
        """The number of steps from one due one to the next, on average."""
        return self.planned / len(self.listed) if self.listed and self.planned else self.every

    def _up_to(self, number: int) -> int:
        """How many steps are due from 0 to `number`."""
        if self.listed is None:
            return number // self.every + 1
        if self.planned is None or number < self.planned:
            return bisect_right(self.listed, number)
        return len(self.listed) + (number - self.planned) // self.every + 1


class Schedule:
    """When each part of the model is due.

    Each part has its own interval (`attention_every`, `experts_every`). Without one, it follows `full_steps` if that
    is set, else `full_every` and `schedule`. If Part.WHOLE is among the `cached` parts, only full steps compute
    anything anew.

    Where a recipe decides by the data, the first step is due, and the last one where the number of steps is known.
    Under error control (`max_error`) the first one is.
    """

    def __init__(self, config: MoecaConfig, cached: Set[Part]) -> None:
        self.config, self.policy, self.whole = config, config.policy, Part.WHOLE in cached
        self.unplanned = self._due(None)
        self.planned = lru_cache(maxsize=64)(self._due)

    def parts_to_refresh(
        self, attention_at: int, experts_at: int, number: int, steps: int | None = None
    ) -> RefreshPlan:
        """What step `number` computes anew.

        Args:
            attention_at, experts_at: the step that last computed each part, -1 where none has. What was due since
                then is due now, also if it was due at a step at which this stream was not called.
            steps: how many the generation is expected to have; None where that is not known.
        """
        if self.policy.decides is not None or self.config.max_error is not None:
            last = self.policy.decides is not None and number + 1 == steps
            return EVERYTHING if attention_at < 0 or last else NOTHING
        attention, experts = self._parts(steps)
        due = attention.within(attention_at, number), experts.within(experts_at, number)
        if all(due):
            return EVERYTHING
        at = CacheStepAt(number, steps, number - max(attention_at, experts_at))
        share = self.policy.share_at(self.config, at) if self.policy.share_at is not None else None
        return RefreshPlan(*due, self.policy.group_at(self.config, at), share)

    def full_steps(self, steps: int | None) -> DueSteps:
        """The steps that compute everything anew in a generation of so many; None where that is not known.

        For recipes without intervals by part.
        """
        return self._parts(steps)[0]

    def _parts(self, steps: int | None) -> tuple[DueSteps, DueSteps]:
        by_length = steps is not None and self.config.schedule != "uniform"
        return self.planned(steps) if by_length else self.unplanned

    def _due(self, steps: int | None) -> tuple[DueSteps, DueSteps]:
        config = self.config
        attention, experts = (
            _due_steps(config, every, steps) for every in (config.attention_every, config.experts_every)
        )
        both = attention.and_of(experts)
        return (both, both) if self.whole else (attention, experts)


def _due_steps(config: MoecaConfig, interval: int | None, steps: int | None) -> DueSteps:
    if interval is not None:
        return DueSteps(interval)
    if config.full_steps is not None:
        return DueSteps(listed=config.full_steps)
    if isinstance(config.schedule, Calibrated):
        steps = steps if steps is not None else config.schedule.steps
        return DueSteps(config.full_every, config.schedule.over(steps), planned=steps)
    every, start = config.full_every, max(0, config.warmup_steps - 1)
    if steps is not None:
        left = steps - start
        if config.schedule == "toca":
            spaced = toca_steps(left, every)
        else:
            full = math.ceil(steps / every) - start
            spaced = CURVED[config.schedule](left, full, config.schedule_exponent)
        return DueSteps(every, (*range(start), *(start + step for step in spaced)), planned=steps)
    return DueSteps(every, tuple(range(start + 1)), planned=start + every) if start else DueSteps(every)


def power_steps(steps: int, full: int, exponent: float) -> tuple[int, ...]:
    """The numbers of `full` full steps in a generation of `steps`, the closer together the later they are."""
    return apart([round(steps * (1 - (1 - i / full) ** exponent)) for i in range(full)], steps)


def tapered_steps(steps: int, full: int, exponent: float) -> tuple[int, ...]:
    """The numbers of `full` full steps in a generation of `steps`: evenly spaced at first, closer toward the end.

    Near the end they lie as `power_steps` has them, but no gap at the start is longer than an even one. There a gap
    does most harm: the first one has no slope to go on, the second one that of the first step, and errors grow from
    then on.
    """

    def place(u: float) -> float:
        return 1 - (1 - u) ** exponent * (1 + (exponent - 1) * u)  # 0 and 1 at the ends, and of slope 1 at 0

    return apart([round(steps * place(i / full)) for i in range(full)], steps)


CURVED = {"power": power_steps, "tapered": tapered_steps}
"""Schedules by their names in options: (steps, full steps, exponent) -> the numbers of the full steps."""


def toca_steps(steps: int, every: int) -> tuple[int, ...]:
    """The numbers of the full steps in a generation of `steps`, as ToCa's code for DiT ("ddpm250") has them.

    With s = steps - 1 - number, which counts down, a step is full if s is divisible by an interval that each full
    step sets anew: every / (1.4 - 0.8 s / steps), rounded, and 2 for 0.2 <= s / steps < 0.4. So full steps are rare
    early on, twice as frequent in that stretch, and the last step is full. The first step is full at any `steps`.
    With `every` = 1 all steps are full, as the option says, though the intervals would be up to 2.
    """
    if steps <= 0:
        return (0,)
    if every == 1:
        return tuple(range(steps))
    found, interval = [0], _toca_interval(steps - 1, steps, every)
    for number in range(1, steps):
        left = steps - 1 - number
        if left % interval == 0:
            found.append(number)
            interval = _toca_interval(left, steps, every)
    return tuple(found)


def _toca_interval(left: int, steps: int, every: int) -> int:
    if 0.2 * steps <= left < 0.4 * steps:
        return 2
    return max(1, round(every / (1.4 - 0.8 * left / steps)))
