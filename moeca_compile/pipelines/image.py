"""One call of a pipeline as a generation, with what its scheduler tells: the time, the number of steps, noise."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeca_compile.pipelines.denoisers import components_of
from moeca_compile.runtime.scope import Generation


class Image(Generation):
    """The generation of one call of `pipe`. The scheduler is looked at when the denoiser is first called: before
    that, the pipeline has not yet told it the steps.

    Args:
        given: the arguments of the call. There may be generators of random numbers among them.
    """

    def __init__(self, pipe: Any, given: Iterable[Any] = ()) -> None:
        super().__init__(steps=None, lasting=False)
        self.pipe = pipe
        self._clock: Clock | None = None
        self._draws = Draws(given)

    def time(self) -> float | None:
        if self._clock is None:
            self._clock = Clock(scheduler_of(self.pipe), getattr(self.pipe, "num_timesteps", None))
            self.steps = self._clock.steps
        self.deterministic = self._draws.none_so_far()
        return self._clock.time()


class Clock:
    """Reads a scheduler's own count of steps, so that the host waits for no device.

    Schedulers that do not count tell no time: it is read from the model's input. So do those that are not told where
    they begin, since that may be in the middle, and one generation must not mix two scales of time.

    Args:
        scheduler: None tells nothing.
        most: the number of calls that the pipeline makes at most, None if it does not say.

    Attributes:
        steps: number of the denoiser's steps; None if not known. Calls in a row at one timestep are one step: solvers
            of second order call twice, and they are then told apart as two streams.
    """

    def __init__(self, scheduler: Any, most: int | None) -> None:
        self.scheduler = scheduler
        self.times = _numbers(getattr(scheduler, "timesteps", None))
        begin = self._index()
        self.counts = begin is not None
        if begin is None:  # a loop that begins in the middle goes to the end
            begin = max(0, len(self.times) - most) if most else 0
        self.steps = _runs(self.times[begin:][:most]) or None

    def time(self) -> float | None:
        """The timestep of the scheduler's current step, in its own unit; None if it does not say."""
        index = self._index()
        if not self.counts or index is None or not self.times:
            return None
        return self.times[min(index, len(self.times) - 1)]

    def _index(self) -> int | None:
        """The current step, or else the one that the pipeline begins at."""
        known = (getattr(self.scheduler, name, None) for name in ("step_index", "begin_index"))
        return next((index for index in known if isinstance(index, int)), None)


class Draws:
    """Whether random numbers are drawn between the denoiser's calls: by the scheduler, which is stochastic then.

    Noise that another thread draws from torch's own generators counts as well, which is on the safe side.

    Args:
        given: may hold generators, and lists of them.
    """

    def __init__(self, given: Iterable[Any]) -> None:
        every = [each for value in given for each in (value if isinstance(value, (list, tuple)) else [value])]
        self._given = [each for each in every if isinstance(each, torch.Generator)]
        self._last: list[Tensor] = []
        self._any = False

    def none_so_far(self) -> bool | None:
        """Called at each call of the denoiser; None at the first, when nothing is known. No device is waited for."""
        now = [generator.get_state() for generator in (*self._given, *_default_generators())]
        before, self._last = self._last, now
        if not before:
            return None
        self._any |= len(now) != len(before) or not all(map(torch.equal, now, before))
        return not self._any


def _default_generators() -> list[torch.Generator]:
    found = [torch.default_generator]
    if torch.cuda.is_initialized():
        found.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return found


def scheduler_of(pipe: Any) -> Any:
    """The pipeline's one scheduler; None where it has several, since nothing says which one a denoiser follows."""
    found = [each for each in components_of(pipe).values() if _schedules(each)]
    return found[0] if len(found) == 1 else None


def _schedules(component: Any) -> bool:
    return hasattr(component, "set_timesteps") and hasattr(component, "step")


def _numbers(timesteps: Any) -> Sequence[float]:
    if not isinstance(timesteps, Tensor) or timesteps.ndim != 1:
        return ()
    return [float(time) for time in timesteps.tolist()]


def _runs(times: Sequence[float]) -> int:
    """How many times differ from the one before, the first included."""
    return len(times[:1]) + sum(now != before for before, now in itertools.pairwise(times))
