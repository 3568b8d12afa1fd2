"""Explicit marks around a generation and its streams, for when timesteps cannot tell them apart."""

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
    """What keeps caches of generations."""

    def drop_ended(self) -> None:
        """Drop those whose context has ended."""


_holders: WeakSet[Holder] = WeakSet()
_numbers = itertools.count(1)
_live: set[int] = set()
_threads = threading.local()
_generation: ContextVar[int | None] = ContextVar("moeca_generation", default=None)
_stream: ContextVar[str | None] = ContextVar("moeca_stream", default=None)
_time: ContextVar[float | None] = ContextVar("moeca_time", default=None)


@contextmanager
def generation() -> Iterator[None]:
    """Everything called inside is one generation, with caches of its own.

    Needed where generations cannot be told apart by their timesteps: parallel generations at the same timesteps,
    requests that interleave on one thread, samplers that go back in time. Caches are dropped when the context
    ends.
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
    """Calls inside belong to one stream of the generation: `stream("cond")`, `stream("uncond")`.

    Needed where separate calls at one timestep do not always come in the same order.
    """
    token = _stream.set(name)
    try:
        yield
    finally:
        _stream.reset(token)


@contextmanager
def step(time: float) -> Iterator[None]:
    """Calls inside are at the timestep `time`, a Python number; the timestep that they are given is not read.

    Needed where that lies on an accelerator and reading it, once a call, makes the host wait for the device. Any
    numbers do that go from step to step as the timesteps go: forecasts reach along them. Raises ValueError for a
    number that is not finite.
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
    """Tell `holder`, as long as it lives, whenever the context of a generation ends."""
    _holders.add(holder)


def current_generation() -> tuple[str, int]:
    """A key of the generation under way: the context's, else the thread's."""
    number = _generation.get()
    return ("scope", number) if number is not None else ("thread", _thread_number())


def _thread_number() -> int:
    """A number of the thread that, unlike its identifier, no later thread gets again."""
    if not hasattr(_threads, "number"):
        _threads.number = next(_numbers)
    return int(_threads.number)


def ended(key: tuple[object, ...]) -> bool:
    """Whether the context that a generation's key stands for has ended."""
    return key[0] == "scope" and key[1] not in _live


def in_scope() -> bool:
    """Whether a generation was marked by hand."""
    return _generation.get() is not None


def current_time() -> float | None:
    """The timestep marked by hand, if any."""
    return _time.get()


def current_stream() -> str | None:
    """The stream marked by hand, if any."""
    return _stream.get()
