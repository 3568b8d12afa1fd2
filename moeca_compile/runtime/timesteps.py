"""Which input is the timestep, where a model embeds several scalars alike (a guidance scale beside the time)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from moeca_compile.runtime import scope
from moeca_compile.runtime.session import Timestep

Move = tuple[int, bool]
"""Which candidate changed, and whether it grew."""


class TimestepInput:
    """Told by the calls: the timestep goes on in one direction, two times, while the other candidates stay.

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
