"""Marks of generations, streams and steps, for calls that do not show by themselves what they belong to.

A `Generation` is entered around calls, as often as wanted, in any thread, task or context, and in any order: it is
a handle, and only the calls inside belong to it. What is entered is a context variable, so each task and each thread
has its own. Leaving takes the mark out of the context at hand, whichever that is, and never fails: a generator may be
resumed in another context than the one that it was left in.
"""

from __future__ import annotations

import itertools
import math
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol
from weakref import WeakSet


class Holder(Protocol):
    """An owner of caches that belong to generations."""

    def drop_ended(self) -> None:
        """Drop the caches of generations that have ended."""


_holders: WeakSet[Holder] = WeakSet()
_numbers = itertools.count(1)
_threads = threading.local()
_entered: ContextVar[tuple[Generation, ...]] = ContextVar("moeca_generations", default=())
_stream: ContextVar[tuple[str | int, ...]] = ContextVar("moeca_streams", default=())
_time: ContextVar[tuple[float, ...]] = ContextVar("moeca_times", default=())
_open: WeakSet[Generation] = WeakSet()
"""Generations that somebody is inside of now, in some context."""


class Generation:
    """A handle of one generation: `with handle: model(...)` marks calls that belong to it.

    Attributes:
        steps: how many steps it has; its caches are dropped after the last. None where that is not known.
        deterministic: whether its sampler is, as far as known; else None.
        lasting: whether it can be entered again after it has been left.
    """

    def __init__(self, steps: int | None, lasting: bool, deterministic: bool | None = None) -> None:
        self.number, self.steps, self.lasting = next(_numbers), steps, lasting
        self.deterministic = deterministic
        self.calls = 0
        """Calls of cached models that were marked by it."""
        self.missed = 0
        """Unmarked calls of cached models while somebody was inside."""
        self._inside, self._ended = 0, threading.Event()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _drop_ended)
        self._finalizer.atexit = False

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def time(self) -> float | None:
        """The time of the current step, if whoever samples says it; here nobody does. `step()` goes before it."""
        return None

    def __enter__(self) -> Generation:
        """Raises RuntimeError if it has ended."""
        if self.ended:
            raise RuntimeError(
                "this generation has ended. To enter one more than once, make it with its model: "
                "g = moeca_compile.generation(model), and end it by g.close()"
            )
        with self._lock:
            self._inside += 1
            _open.add(self)
        _entered.set((*_entered.get(), self))
        return self

    def __exit__(self, *_: Any) -> None:
        _entered.set(_without_last(_entered.get(), self))
        with self._lock:
            self._inside -= 1
            left = self._inside <= 0
            if left:
                _open.discard(self)
        if left and not self.lasting:
            self.close()

    def close(self) -> None:
        """End the generation: its caches are dropped. Again is no error."""
        if not self.ended:
            self._ended.set()
            _open.discard(self)
            if self.missed and not self.calls:
                warnings.warn(
                    f"moeca: none of the {self.missed} calls that were made while a generation() was entered "
                    "reached it, because it marks only the context that it is entered in, and that is not the one of "
                    "a worker thread or another task. Enter it where the model is called: g = "
                    "moeca_compile.generation(model), then `with g: model(...)` in the worker",
                    stacklevel=3,
                )
            _drop_ended()


def generation(model: Any = None, steps: int | None = None, deterministic: bool | None = None) -> Generation:
    """Mark calls that belong to one generation, with caches of its own.

    Needed where neither timesteps nor arguments tell generations apart: requests with equal arguments on a GPU,
    samplers that go back in time.

        with moeca_compile.generation():                        # ends, and drops its caches, when it is left
            ...  # the sampling loop

        g = moeca_compile.generation(model, steps=50)           # a handle, entered per step in any thread or task
        with g:
            model(x, t)
        g.close()

    Args:
        model: the compiled model. With one, the generation may be entered any number of times, and ends by `close()`,
            after its last step, or when nobody holds it any more. Without, it ends when it is left.
        steps: the number of its steps, so that it ends by itself.
        deterministic: whether its sampler draws no noise between its steps (Euler, DPM-Solver), or does (DDPM). The
            recipe `auto` makes use of that; others have the options `corrector` and `forecast_slope`.

    Raises ValueError unless `steps` is None or at least 1.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"moeca_compile.generation(steps={steps!r}): a generation has at least one step")
    return Generation(steps, model is not None, deterministic)


@contextmanager
def stream(name: str | int) -> Iterator[None]:
    """All calls inside belong to one stream of the generation: `stream("cond")`, `stream("uncond")`.

    Needed where the arguments of several calls at one timestep do not tell which is which, and they do not always
    come in the same order.
    """
    _stream.set((*_stream.get(), name))
    try:
        yield
    finally:
        _stream.set(_without_last(_stream.get(), name))


@contextmanager
def step(time: float) -> Iterator[None]:
    """All calls inside are at the timestep `time`; the timestep argument of the model is not read.

    Needed on an accelerator, where reading that argument makes the host wait for the device at every call, and where
    no argument is recognized as the timestep. `time` is a Python number. It must change in proportion to the
    timestep, since forecasts extrapolate along it.

    Raises ValueError for a number that is not finite.
    """
    value = float(time)
    if not math.isfinite(value):
        raise ValueError(f"moeca_compile.step({time!r}): a timestep is a finite number")
    _time.set((*_time.get(), value))
    try:
        yield
    finally:
        _time.set(_without_last(_time.get(), value))


def _without_last(marks: tuple[Any, ...], mark: Any) -> tuple[Any, ...]:
    """The marks without the last one that is `mark`; all of them where none is, as in a context of its own."""
    for i in reversed(range(len(marks))):
        if marks[i] is mark:
            return marks[:i] + marks[i + 1 :]
    return marks


def at_end(holder: Holder) -> None:
    """Call `holder.drop_ended()` whenever a generation ends, for as long as `holder` lives."""
    _holders.add(holder)


def _drop_ended() -> None:
    for holder in list(_holders):
        holder.drop_ended()


def current_generation() -> Generation | None:
    """The generation that the current call belongs to, by its mark. One that has ended marks nothing."""
    entered = _entered.get()
    return next((each for each in reversed(entered) if not each.ended), None) if entered else None


def note_unmarked_call() -> None:
    """Count a call without a mark for the generations that somebody is inside of elsewhere."""
    for each in list(_open):
        each.missed += 1


def thread_number() -> int:
    """A number of the current thread. Unlike its identifier, it is never used again for a later thread."""
    if not hasattr(_threads, "number"):
        _threads.number = next(_numbers)
    return int(_threads.number)


def current_time() -> float | None:
    """The time that `step()` marks, or else the generation that is entered, if any."""
    marks = _time.get()
    if marks:
        return marks[-1]
    handle = current_generation()
    return handle.time() if handle is not None else None


def current_stream() -> str | int | None:
    """The name that `stream()` marks, if any."""
    marks = _stream.get()
    return marks[-1] if marks else None
