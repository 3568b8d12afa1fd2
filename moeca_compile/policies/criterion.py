"""Criteria: whether a step is full, decided on the host step by step, from what a probe of the step says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeca_compile.options import Options
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.probe import Probe

Memory = dict[Any, Any]
"""What the streams of one name keep from one generation to the next."""
Signal = Callable[[], float]
"""The probe's signal. Whoever calls it waits for the device."""


@dataclass(frozen=True)
class StepAt:
    """Where a step stands in its generation.

    Attributes:
        number: from 0.
        steps: how many steps the generation is expected to have; None where nothing says.
        time: the timestep.
    """

    number: int
    steps: int | None
    time: float


class Criterion:
    """Decides for one stream of one generation, and lives as long as its caches. A base for criteria of policies.

    In every recipe the first step is full, and so is the last one where the number of steps is known: nobody asks
    about these, nor about steps whose stream is not certain. A criterion decides on the others, in order.

    Args:
        options: those in force.
        memory: shared with earlier and later streams of the same name.
    """

    def __init__(self, options: Options, memory: Memory) -> None:
        self.options, self.memory = options, memory
        self.reused = 0
        """Steps since the last full one."""
        self.at: StepAt | None = None
        self.before: StepAt | None = None
        """The step before the one at hand; None at the first step, and where it may be another picture's."""
        self.full_before = False
        """Whether that was full."""
        self.remark = ""
        """What the user should be told."""

    def is_full(self, at: StepAt, signal: Signal) -> bool:
        """Whether this step is full. The signal is read where it matters only."""
        self._enter(at)
        most = self.options.max_reused
        full = at.number < self.warmup(at) or (most is not None and self.reused >= most) or self.exceeds(at, signal)
        if full:
            self._count_anew()
        else:
            self.reused += 1
        return full

    def forced(self, at: StepAt) -> None:
        """The step is full, whatever its signal says."""
        self._enter(at)
        self._count_anew()

    def forget(self) -> None:
        """What went before belongs to another picture, perhaps."""
        self.at = None
        self._count_anew()

    def _enter(self, at: StepAt) -> None:
        self.before, self.full_before = self.at, self.reused == 0
        self.at = at

    def _count_anew(self) -> None:
        self.reused = 0
        self.restart()

    # --- what criteria differ in ----------------------------------------------------------------------------

    def warmup(self, at: StepAt) -> float:
        """How many steps at the beginning are full."""
        return self.options.warmup_steps

    def exceeds(self, at: StepAt, signal: Signal) -> bool:
        """Whether the error of reusing is too large at this step."""
        raise NotImplementedError

    def restart(self) -> None:
        """A full step has run: errors add up anew."""

    def measured(self, at: StepAt, signal: Signal) -> None:
        """The signal of a probe that runs after full steps. The device has it when a later generation asks."""


@dataclass(frozen=True)
class Decides:
    """How a policy decides on steps by the data.

    Attributes:
        criterion: makes the criterion of a stream.
        probe: what it asks about each step; None where it needs nothing.
        ratios: of a memory, what a report has as magnitude ratios; none for most policies.
    """

    criterion: Callable[[Options, Memory], Criterion]
    probe: Callable[[Options, Regions], Probe | None]
    ratios: Callable[[Memory], list[float]] = lambda memory: []
