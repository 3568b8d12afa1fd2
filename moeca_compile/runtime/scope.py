"""Context managers that mark generations, streams and steps, for calls whose timesteps do not identify them."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol
from weakref import WeakSet


class Holder(Protocol):
    """An owner of caches that belong to generations."""

    def drop_ended(self) -> None:
        """Drop the caches of generations whose context has ended."""


_holders: WeakSet[Holder] = WeakSet()
_numbers = itertools.count(1)
_live: set[int] = set()
_threads = threading.local()
_generation: ContextVar[int | None] = ContextVar("moeca_generation", default=None)
_stream: ContextVar[str | None] = ContextVar("moeca_stream", default=None)
_time: ContextVar[float | None] = ContextVar("moeca_time", default=None)


@contextmanager
def generation() -> Iterator[None]:
    """All calls inside are one generation, with caches of its own. The caches are dropped when the context ends.

    Needed where timesteps do not identify generations: requests that interleave on one thread, samplers that go back
    in time, a new generation after a cancelled one.
    """
    number = next(_numbers)
    _live.add(number)
    token = _generation.set(number)
    try:
        yield
    finally:
        _generation.reset(token)
        _live.discard(number)
        for holder in list(_holders):
            holder.drop_ended()


@contextmanager
def stream(name: str) -> Iterator[None]:
    """All calls inside belong to one stream of the generation: `stream("cond")`, `stream("uncond")`.

    Needed where several calls at one timestep do not always come in the same order.
    """
    token = _stream.set(name)
    try:
        yield
    finally:
        _stream.reset(token)


@contextmanager
def step(time: float) -> Iterator[None]:
    """All calls inside are at the timestep `time`; the timestep argument of the model is not read.

    Needed on an accelerator, where reading that argument makes the host wait for the device at every call. `time` is
    a Python number. It must change in proportion to the timestep, since forecasts extrapolate along it.

    Raises ValueError for a number that is not finite.
    """
    value = float(time)
    if not math.isfinite(value):
        raise ValueError(f"moeca_compile.step({time!r}): a timestep is a finite number")
    token = _time.set(value)
    try:
        yield
    finally:
        _time.reset(token)


def at_end(holder: Holder) -> None:
    """Call `holder.drop_ended()` whenever the context of a generation ends, for as long as `holder` lives."""
    _holders.add(holder)


def current_generation() -> tuple[str, int]:
    """The key of the current generation: that of the context, or of the thread where there is none."""
    number = _generation.get()
    return ("scope", number) if number is not None else ("thread", _thread_number())


def _thread_number() -> int:
    """A number of the current thread. Unlike its identifier, it is never used again for a later thread."""
    if not hasattr(_threads, "number"):
        _threads.number = next(_numbers)
    return int(_threads.number)


def ended(key: tuple[object, ...]) -> bool:
    """Whether `key` is of a generation whose context has ended."""
    return key[0] == "scope" and key[1] not in _live


def in_scope() -> bool:
    """Whether the current call is inside `generation()`."""
    return _generation.get() is not None


def current_time() -> float | None:
    """The time that `step()` marks, if any."""
    return _time.get()


def current_stream() -> str | None:
    """The name that `stream()` marks, if any."""
    return _stream.get()
