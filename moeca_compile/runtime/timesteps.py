"""The time of a call: the user's mark, else the input that is the timestep.

Where a model embeds several scalars alike (a guidance scale beside the time), the calls tell which of them it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.notes import Notes
from moeca_compile.runtime import scope

Timestep = tuple[float, ...]
"""The times of a call's samples, or the one time of all."""
Move = tuple[int, bool]
"""Which candidate changed, and whether it grew."""

_UNCLEAR = 3
"""Calls at which all candidates for the timestep changed, before a warning says that nothing is cached."""


class TimestepReader:
    """Reads the time of each call of one compiled graph."""

    def __init__(self, compiled: CompiledGraph, notes: Notes) -> None:
        self.compiled, self.notes = compiled, notes
        self.input = TimestepInput(len(compiled.timesteps))

    @property
    def known(self) -> bool:
        """Whether a call's time can be told before the call is looked at."""
        return self.input.found is not None or scope.current_time() is not None

    @property
    def direction(self) -> float:
        return self.input.direction

    def read(self, inputs: Sequence[Any]) -> Timestep | None:
        """The time of a call; None while it is not known which input is the timestep."""
        marked = scope.current_time()
        if marked is not None:
            return (marked,)
        time = self.input.read([partial(self.value, inputs[place]) for place in self.compiled.timesteps])
        if time is None and self.input.unclear >= _UNCLEAR:
            names = " and ".join(repr(self.compiled.captured.names[place]) for place in self.compiled.timesteps)
            self.notes.warn(
                f"the inputs {names} are embedded like timesteps and change together, so nothing is cached: which of "
                "them is the time cannot be told. Let only one of them change from step to step, or mark calls with "
                "different values at one step with moeca_compile.stream(name)"
            )
        return time

    def value(self, given: Any) -> Timestep:
        """An input's numbers, read on the host: from an accelerator by one copy, for which the host waits."""
        return tuple(given.detach().flatten().tolist()) if isinstance(given, Tensor) else (float(given),)


class TimestepInput:
    """Which of several candidates is the timestep: the one that moves twice in the same direction while the others
    stay constant.

    Calls before that are not in any generation. The calls compared are those of one generation and stream, as far
    as `scope` knows them.
    """

    def __init__(self, candidates: int) -> None:
        self.found: int | None = 0 if candidates == 1 else None
        self.direction = 0.0
        """1 or -1, as soon as the timestep was seen to go on."""
        self.unclear = 0
        """Calls so far at which several candidates changed."""
        self._last: dict[Hashable, tuple[Sequence[Timestep], Move | None]] = {}

    def read(self, candidates: Sequence[Callable[[], Timestep]]) -> Timestep | None:
        """The timestep of a call; None while it is not known which of the candidates it is.

        Once it is known no other one is read: a value on an accelerator makes the host wait.
        """
        if self.found is None:
            values = [candidate() for candidate in candidates]
            self._compare(values)
            return values[self.found] if self.found is not None else None
        return candidates[self.found]()

    def _compare(self, values: Sequence[Timestep]) -> None:
        key = (scope.current_generation(), scope.current_stream())
        before, last = self._last.get(key, (values, None))
        moves = [(i, now > then) for i, (now, then) in enumerate(zip(values, before, strict=True)) if now != then]
        move = moves[0] if len(moves) == 1 else None
        if move is not None and move == last:
            self.found, self.direction = move[0], 1.0 if move[1] else -1.0
        self.unclear += len(moves) > 1
        self._last[key] = values, (move if moves else last)
