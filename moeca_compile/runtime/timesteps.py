"""The time of a call: the user's mark, or the input that is the timestep.

Where a model embeds several inputs in the same way (a guidance scale and the timestep), they are *candidates*. The
calls show which of them is the timestep. Where it takes sines of none, the candidates are *guesses* by their form
(passes.match.timestep): a single floating-point one is taken at once, while integers may be class labels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence, Set
from functools import partial
from typing import Any

from torch import Tensor

from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.notes import Notes
from moeca_compile.runtime import scope
from moeca_compile.runtime.ranks import UNCLEAR

Timestep = tuple[float, ...]
"""One time for each sample of a call, or one for all."""
Move = tuple[int, bool]
"""The index of the candidate that changed, and whether it grew."""

_UNCLEAR = 3
"""After this many calls at which several candidates changed, warn that nothing is cached."""
_UNSURE = 6
"""After this many calls at which no guess moved as a timestep does, warn."""

NO_TIMESTEP = (
    "no timestep was found among the model's inputs, so steps and generations cannot be detected. The model runs "
    "uncached, so sampling is no faster. Pass the timestep as a tensor argument that reaches a sinusoidal embedding, "
    "or mark each call with moeca_compile.step(time)"
)
NOT_MOVING = (
    "the timestep is not known: the model takes sine and cosine of no input, and {0}, which may be the timestep, did "
    "not move as a timestep does in the calls so far. Nothing is cached until it does, so sampling is no faster. "
    "Mark each call with moeca_compile.step(time)"
)
EMBEDDED_ALIKE = (
    "the inputs {0} are embedded like timesteps and change together, so the timestep is not known. Nothing is "
    "cached: every step is a full step. Let only the timestep change from call to call, or mark calls at one "
    "timestep that differ in the other input with moeca_compile.stream(name)"
)
GUESSED_ALIKE = (
    "each of the inputs {0} may be the timestep, and the calls do not show which of them is. Nothing is cached: "
    "every step is a full step. Mark each call with moeca_compile.step(time), and calls at one timestep that differ "
    "in another input with moeca_compile.stream(name)"
)


class TimestepReader:
    """Reads the time of each call of one compiled graph."""

    def __init__(self, compiled: CompiledGraph, notes: Notes) -> None:
        self.compiled, self.notes = compiled, notes
        labels = {place for place, i in enumerate(compiled.timesteps) if i in compiled.perhaps_labels}
        self.input = TimestepInput(len(compiled.timesteps), compiled.regions.guessed, labels)
        self.position = self._position()
        """The position of the input that is the timestep; None while that is not known."""
        self.told_at_once = self.input.found is not None and not (compiled.regions.guessed and labels)
        """Whether that was known before any call."""

    @property
    def direction(self) -> float:
        return self.input.direction

    @property
    def unclear_on_ranks(self) -> bool:
        """Whether ranks may take different inputs for the timestep, by what their calls hold. Warns if so."""
        unclear = bool(self.compiled.groups) and not self.told_at_once and scope.current_time() is None
        if unclear:
            self.notes.warn(UNCLEAR)
        return unclear

    def read(self, inputs: Sequence[Any]) -> Timestep | None:
        """The time of a call; None while it is not known which input is the timestep."""
        marked = scope.current_time()
        if marked is not None:
            return (marked,)
        sure = self.input.sure
        time = self.input.read([partial(self.value, inputs[i]) for i in self.compiled.timesteps])
        if not sure:
            self._learn(time is not None)
        return time

    def _learn(self, taken: bool) -> None:
        """Take over what the call has shown, or warn that the calls so far should have shown it."""
        self.position = self._position()
        reason = self._why_unknown(taken)
        if reason is not None:
            self.notes.warn(reason)

    def _position(self) -> int | None:
        return None if self.input.found is None else self.compiled.timesteps[self.input.found]

    def _why_unknown(self, taken: bool) -> str | None:
        """Why the timestep is not known, once the calls so far should have shown it."""
        unclear, unsure = not taken and self.input.unclear >= _UNCLEAR, self.input.unsure >= _UNSURE
        if not self.compiled.timesteps:
            return NO_TIMESTEP
        if not unclear and not unsure:
            return None
        names = " and ".join(repr(self.compiled.captured.names[i]) for i in self.compiled.timesteps)
        if unclear:
            return (GUESSED_ALIKE if self.compiled.regions.guessed else EMBEDDED_ALIKE).format(names)
        return NOT_MOVING.format(names)

    def value(self, given: Any) -> Timestep:
        """The numbers of an input. If it is on an accelerator, the host waits for the device."""
        return tuple(given.reshape(-1).tolist()) if isinstance(given, Tensor) else (float(given),)


class TimestepInput:
    """Which of several candidates is the timestep: the one that moves twice in the same direction while the others
    stay constant.

    Calls before that belong to no generation. Calls are compared within one generation and stream, as far as these
    are marked (runtime.scope).

    Args:
        candidates: how many there are.
        guessed: whether they are guesses by their form. A single one is taken, and watched too.
        labels: those that may be class labels: whether they change does not matter where there are others. Without
            others, the timestep is the one that falls twice, for all samples alike.
    """

    def __init__(self, candidates: int, guessed: bool = False, labels: Set[int] = frozenset()) -> None:
        self.guessed, self.labels = guessed, labels
        numbers = [i for i in range(candidates) if i not in labels]
        self.only_labels = not numbers
        self.found: int | None = numbers[0] if len(numbers) == 1 else None
        self.sure = self.found is not None and not guessed
        self.direction = 0.0
        """1 or -1 once the timestep is found: whether it grows or falls."""
        self.unclear = 0
        """Calls so far at which several candidates changed."""
        self.unsure = 0
        """Calls of guesses until one moved as a timestep does."""
        self._last: dict[Hashable, tuple[Sequence[Timestep], Move | None, Move | None]] = {}
        """The values of the last call, the last move of a number, and that of a label."""

    def read(self, candidates: Sequence[Callable[[], Timestep]]) -> Timestep | None:
        """The timestep of a call; None while it is not known which candidate it is.

        Once it is known, the other candidates are not read: on an accelerator each read makes the host wait.
        """
        if self.sure and self.found is not None:
            return candidates[self.found]()
        values = [candidate() for candidate in candidates]
        self._compare(values)
        return values[self.found] if self.found is not None else None

    def _compare(self, values: Sequence[Timestep]) -> None:
        marked = scope.current_generation()
        key = (scope.thread_number() if marked is None else -marked.number, scope.current_stream())
        before, last, fell = self._last.get(key, (values, None, None))
        moves = [(i, now > then) for i, (now, then) in enumerate(zip(values, before, strict=True)) if now != then]
        numbers = [move for move in moves if move[0] not in self.labels]
        number = numbers[0] if len(numbers) == 1 else None
        label = moves[0] if len(moves) == 1 and self._label_falls(moves[0], values, before) else None
        if number is not None and number == last:
            self.found, self.direction = number[0], 1.0 if number[1] else -1.0
            self.sure, self.unsure = True, 0
        elif label is not None and label == fell:
            self._label_fell_twice(label[0])
        self.unsure += self.guessed and not self.sure
        self.unclear += len(moves if self.only_labels else numbers) > 1
        self._last[key] = values, (number if numbers else last), (label if moves else fell)

    def _label_falls(self, move: Move, now: Sequence[Timestep], before: Sequence[Timestep]) -> bool:
        """Whether a candidate that may be a label falls, and for all samples alike."""
        place, grows = move
        return place in self.labels and not grows and len({*now[place]}) == len({*before[place]}) == 1

    def _label_fell_twice(self, place: int) -> None:
        """It is the timestep, unless a candidate that is no label stays: then nothing is sure."""
        if self.only_labels:
            self.found, self.direction, self.sure, self.unsure = place, -1.0, True, 0
        else:
            self.found, self.unclear = None, _UNCLEAR
