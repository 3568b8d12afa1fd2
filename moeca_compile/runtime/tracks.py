"""What is known of a request under way: its tracks, the step that it has reached, and what a call brings."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from moeca_compile.runtime.arguments import Marks
from moeca_compile.runtime.continuation import Trajectory
from moeca_compile.runtime.scope import Generation
from moeca_compile.runtime.seen_sampler import SeenSampler
from moeca_compile.runtime.timesteps import Timestep

_FAR = 10.0
"""A change of the timestep this many times the largest so far starts a new request: the last was cancelled."""


class Owner(Protocol):
    """Owns the caches of tracks: one graph at one set of input shapes (runtime.streams)."""

    def take_back(self, name: Hashable, caches: Any) -> None:
        """Take the caches of a track that has ended, `name` in its request."""


@dataclass(frozen=True)
class Call:
    """What a call brings.

    Attributes:
        time: None where it is not known.
        marks: of its arguments, but for the timestep and the picture.
        picture: the input that a sampler changes from step to step; None where none is known, or none is compared.
        owner: of the caches that it needs.
        form: calls of different forms cannot share caches: inside and outside inference mode.
    """

    time: Timestep | None
    owner: Owner
    marks: Marks = field(default_factory=dict)
    picture: Tensor | None = None
    form: Hashable = None


@dataclass(eq=False)
class Track:
    """One stream of a request: calls that differ in time and picture alone."""

    owner: Owner
    form: Hashable
    name: Hashable
    """That of the user, if any."""
    marks: Marks
    begun_by: frozenset[str] = frozenset()
    """The arguments that told its first call from the tracks that there were."""
    number: int = -1
    """The step at which it was called last."""
    thread: int = 0
    """The thread of its last call."""
    doubtful: bool = False
    """Whether its next step is uncertain, whatever that brings."""
    trajectory: Trajectory = field(default_factory=Trajectory)
    caches: Any = None
    crowded_out: bool = False
    """Whether it lost its caches to others while it was in use."""


@dataclass(eq=False)
class Request:
    """One generation: its tracks, and the time and step that it has reached."""

    handle: weakref.ref[Generation] | None = None
    """The user's mark, if any."""
    expected: int | None = None
    """How many steps it is expected to have; None where nothing says."""
    tracks: list[Track] = field(default_factory=list)
    time: Timestep | None = None
    direction: float = 0.0
    """Its sign says whether the timestep grows or falls; 0 while that is not known."""
    moves: int = 0
    """How often the timestep has moved in that direction."""
    largest: float = 0.0
    """The largest change of the timestep between two steps so far."""
    number: int = -1
    """Number of the current step, from 0; -1 before the first call."""
    calls: deque[int] = field(default_factory=lambda: deque(maxlen=3))
    """Calls at this step so far, and those at the two steps before, the latest last."""
    sampler: SeenSampler | None = None
    """What is seen of its sampler; None where nobody looks."""

    @property
    def told(self) -> bool | None:
        """Whether its sampler is deterministic, as far as its handle says."""
        handle = self.handle() if self.handle is not None else None
        return handle.deterministic if handle is not None else None

    @property
    def deterministic(self) -> bool | None:
        """The same, where nobody has told as far as it is seen."""
        told = self.told
        return self.sampler.deterministic() if told is None and self.sampler is not None else told

    def moved(self, time: Timestep | None) -> float | None:
        """By how much `time` is further on: 0 at the same time, None where it lies back or far ahead.

        Each sample has its own time. All of them move in one direction, or stay.
        """
        if time is None or self.time is None:
            return 1.0
        steps = [now - then for now, then in zip(*aligned(time, self.time), strict=True)]
        up, down = max(steps), min(steps)
        step = up if up > -down else down
        if not step:
            return 0.0
        far = self.largest > 0 and abs(step) > _FAR * self.largest
        return None if up * down < 0 or step * self.direction < 0 or far else step

    def begin_step(self, time: Timestep | None, step: float) -> None:
        if time is not None and self.time is not None:
            self.moves = self.moves + 1 if step * self.direction >= 0 else 1
            self.direction, self.largest = step, max(self.largest, abs(step))
        self.time, self.number = time, self.number + 1
        self.calls.append(0)

    def name_of(self, track: Track) -> Hashable:
        """A track's name, by which the next request finds its like: the user's, or its place."""
        return track.name if track.name is not None else self.tracks.index(track)

    @property
    def steps(self) -> int | None:
        """How many steps it has, if the user said."""
        handle = self.handle() if self.handle is not None else None
        return handle.steps if handle is not None else None

    @property
    def ended(self) -> bool:
        """Whether the user has ended it, or nobody holds its handle any more."""
        if self.handle is None:
            return False
        handle = self.handle()
        return handle is None or handle.ended


def aligned(time: Timestep, other: Timestep) -> tuple[Timestep, Timestep]:
    """Two lists of times with as many samples: one time stands for all, and joined passes repeat those of one."""
    most = max(len(time), len(other))
    if most % len(time) or most % len(other):
        return time[:1], other[:1]
    return time * (most // len(time)), other * (most // len(other))


@dataclass(frozen=True)
class Position:
    """The request, track, step number and time of a call, and whether it is certain that they are these."""

    request: Request
    track: Track
    number: int
    time: float
    certain: bool
