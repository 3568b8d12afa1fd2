"""The time of a call: the user's mark, or the input that is the timestep.

Where a model embeds several inputs in the same way (a guidance scale and the timestep), they are *candidates*. The
calls show which of them is the timestep.
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
"""One time for each sample of a call, or one for all."""
Move = tuple[int, bool]
"""The index of the candidate that changed, and whether it grew."""

_UNCLEAR = 3
"""After this many calls at which several candidates changed, warn that nothing is cached."""


class TimestepReader:
    """Reads the time of each call of one compiled graph."""

    def __init__(self, compiled: CompiledGraph, notes: Notes) -> None:
        self.compiled, self.notes = compiled, notes
        self.input = TimestepInput(len(compiled.timesteps))

    @property
    def known(self) -> bool:
        """Whether the time of the next call will be known."""
        return self.input.found is not None or scope.current_time() is not None

    @property
    def direction(self) -> float:
        return self.input.direction

    def read(self, inputs: Sequence[Any]) -> Timestep | None:
        """The time of a call; None while it is not known which input is the timestep."""
        marked = scope.current_time()
        if marked is not None:
            return (marked,)
        time = self.input.read([partial(self.value, inputs[i]) for i in self.compiled.timesteps])
        if time is None and self.input.unclear >= _UNCLEAR:
            names = " and ".join(repr(self.compiled.captured.names[i]) for i in self.compiled.timesteps)
            self.notes.warn(
                f"the inputs {names} are embedded like timesteps and change together, so the timestep is not known. "
                "Nothing is cached: every step is a full step. Let only the timestep change from call to call, or "
                "mark calls at one timestep that differ in the other input with moeca_compile.stream(name)"
            )
        return time

    def value(self, given: Any) -> Timestep:
        """The numbers of an input. If it is on an accelerator, the host waits for the device."""
        return tuple(given.reshape(-1).tolist()) if isinstance(given, Tensor) else (float(given),)


class TimestepInput:
    """Which of several candidates is the timestep: the one that moves twice in the same direction while the others
    stay constant.

    Calls before that belong to no generation. Calls are compared within one generation and stream, as far as these
    are marked (runtime.scope).
    """

    def __init__(self, candidates: int) -> None:
        self.found: int | None = 0 if candidates == 1 else None
        self.direction = 0.0
        """1 or -1 once the timestep is found: whether it grows or falls."""
        self.unclear = 0
        """Calls so far at which several candidates changed."""
        self._last: dict[Hashable, tuple[Sequence[Timestep], Move | None]] = {}

    def read(self, candidates: Sequence[Callable[[], Timestep]]) -> Timestep | None:
        """The timestep of a call; None while it is not known which candidate it is.

        Once it is known, the other candidates are not read: on an accelerator each read makes the host wait.
        """
        if self.found is None:
            values = [candidate() for candidate in candidates]
            self._compare(values)
            return values[self.found] if self.found is not None else None
        return candidates[self.found]()

    def _compare(self, values: Sequence[Timestep]) -> None:
        marked = scope.current_generation()
        key = (scope.thread_number() if marked is None else -marked.number, scope.current_stream())
        before, last = self._last.get(key, (values, None))
        moves = [(i, now > then) for i, (now, then) in enumerate(zip(values, before, strict=True)) if now != then]
        move = moves[0] if len(moves) == 1 else None
        if move is not None and move == last:
            self.found, self.direction = move[0], 1.0 if move[1] else -1.0
        self.unclear += len(moves) > 1
        self._last[key] = values, (move if moves else last)
