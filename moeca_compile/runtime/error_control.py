"""Error control: gaps between full steps are as long as the forecast's own error allows (option `max_error`).

A full step r gives the exact output v_r; a cache step in its place would have given v^_r. So the error of the
forecast at the end of the gap is known at the price of that cache step, which the corrector runs anyway:

    e_r = |v_r - v^_r| / |v_r|, of each sample; the largest decides.

A forecast of order n has an error that grows like gap^(n+1), and the picture takes it on for the length of the gap.
So what is held at `max_error` is e_r (r - q) / G, with q the full step before and G the schedule's mean gap. It grows
like gap^(n+2): an error at the end of a long gap counts more than one at the end of a short gap.

Gaps are measured in those that the schedule plans there, so that its shape stays: a gap of phase 1 is the planned
one, wherever in the generation it lies. After a full step that ended a gap of phase d,

    wanted phase = d (max_error G / (e_r (r - q)))^(1 / (n+2)), from 1/2 to 2.

Errors scatter from one gap to the next. So the next phase is the geometric mean of the wanted one and of the one that
was meant to be the last (docs/policies.md). There are from half to twice as many full steps as planned.
The first error of a straight line, or of a higher order, is that of a held value, which says little of the next: it
does not count, so the first two gaps are the schedule's.

The error is copied while the host goes on. It is read at the first later step that could be the next full one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeca_compile.config import MoecaConfig
from moeca_compile.policies.criterion import Criterion, Signal, StepAt
from moeca_compile.policies.forecast import rule_of
from moeca_compile.runtime.schedule import DueSteps

LEAST, MOST = 0.5, 2.0
"""Bounds of a gap, in planned ones."""
_TIE = 1e-9
"""Rounding must not decide between two steps that are as near to where the next full step should be."""


class ErrorControl(Criterion):
    """Decides which steps of one stream are full, by the errors at its last ones.

    Args:
        config: `max_error`, the order of the forecast, and the steps at the beginning that are full in any case.
        plan: the schedule for a number of steps, None where that is not known.

    Attributes:
        measures: whether the error of the full step under way is of use: it is not where the step is full for want of
            valid caches.
    """

    def __init__(self, config: MoecaConfig, plan: Callable[[int | None], DueSteps]) -> None:
        super().__init__(config, {})
        assert config.max_error is not None, "no error control without a bound"
        self.bound, self.plan = config.max_error, plan
        self.order = rule_of(config).order if config.forecast else 0
        self.measures = False
        self.pending: Signal | None = None
        """The last error, where it has not been read."""
        self.used = self.order
        """The order of the forecast that made it."""
        self._begin_anew()

    def is_full(self, at: StepAt, signal: Signal) -> bool:
        """Whether this step is full. Waits for the last error where that may decide."""
        plan, self.measures = self.plan(at.steps), False
        place = plan.phase(at.number + 0.5) + _TIE
        if at.number >= self.options.warmup_steps:
            soonest = self.phase if self.pending is None else math.sqrt(self.phase * LEAST)
            if place < self.reached + soonest:
                return False
            self._settle()
            if place < self.reached + self.phase:
                return False
        self._full_at(at.number, plan)
        self.measures = True
        return True

    def forced(self, at: StepAt) -> None:
        """The step is full, whatever the errors were."""
        self.measures = False
        self._full_at(at.number, self.plan(at.steps))

    def forget(self) -> None:
        """What went before belongs to another picture, perhaps."""
        self._begin_anew()

    def measured(self, at: StepAt, signal: Signal) -> None:
        """The error of this full step, which is known when a later one is decided on."""
        used = min(self.order, self.known - 2)  # as far as there were full steps before this one
        if used >= min(self.order, 1):
            self.pending, self.used = signal, used

    def _begin_anew(self) -> None:
        self.known, self.last = 0, -1
        """How many full steps there were, and the number of the last."""
        self.reached = 0.0
        """The place of the last full step among the planned ones: where it should have been, not rounded."""
        self.phase = 1.0
        """The gap after it, in planned ones."""
        self.done, self.weight = 0.0, 0.0
        """The gap before it, in planned ones, and in units of the mean one."""
        self.pending = None

    def _full_at(self, number: int, plan: DueSteps) -> None:
        """A full step. The next gap is counted from where it should have been, so that rounding does not add up."""
        self._settle()
        place, wanted = plan.phase(number), self.reached + self.phase
        near = plan.phase(number - 0.5) - _TIE <= wanted <= plan.phase(number + 0.5) + _TIE
        if self.known:
            self.done, self.weight = place - plan.phase(self.last), (number - self.last) / plan.mean_gap
        self.reached = wanted if self.known and near else place
        self.known, self.last = self.known + 1, number

    def _settle(self) -> None:
        """Read the last error, if that has not been done, and let it decide on the gap under way."""
        if self.pending is not None:
            error, self.pending = self.pending() * self.weight, None
            wanted = min(max(self.done * self._longer(error), LEAST), MOST)
            self.phase = math.sqrt(self.phase * wanted)

    def _longer(self, error: float) -> float:
        """How many times as long the last gap should have been."""
        if not error > 0:
            return math.inf if error == 0 else 0.0  # NaN is no small error
        ratio: float = (self.bound / error) ** (1 / (self.used + 2))
        return ratio


def relative_error(outputs: Sequence[Any], predicted: Sequence[Any], samples: int) -> Tensor | None:
    """The largest error of a sample, as a tensor with one number on the device; None where nothing is floating-point.

    Args:
        outputs, predicted: v and v^, tensors of which those with `samples` rows count together, row by row. Where
            none has so many, all count as one sample.

    NaN where an output is. Of an output of zeros the error is infinite, unless there is none.
    """
    pairs = [pair for pair in zip(outputs, predicted, strict=True) if _counts(pair[0])]
    by_sample = [pair for pair in pairs if pair[0].ndim and len(pair[0]) == samples]
    rows = samples if by_sample else 1
    sums = [_squares(value, guess, rows) for value, guess in by_sample or pairs]
    if not sums:
        return None
    missed, size = torch.stack(sums).sum(0)
    return torch.where(missed == 0, missed, missed / size).amax().sqrt()


def _squares(value: Tensor, guess: Tensor, rows: int) -> Tensor:
    """(2, rows): |v - v^|^2 and |v|^2 of each. In 16 bits this is computed in float32."""
    wide = torch.promote_types(value.dtype, torch.float32)
    exact, error = value.to(wide), value.to(wide) - guess.to(wide)
    return torch.stack([each.reshape(rows, -1).square().sum(1) for each in (error, exact)])


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0
