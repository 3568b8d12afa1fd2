"""Generations, steps and streams, told apart by the timesteps of the calls (or by marks of the user).

A timestep equal to the last call's is the next stream of the same step (separate conditional and
unconditional passes); one that goes on in the same direction is the next step; one that jumps back starts a
new generation.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.rewrite.step import ATTENTION, EXPERTS, CacheSpec, StepKind
from moeca_compile.runtime import scope
from moeca_compile.runtime.schedule import Fresh, fresh_parts

Timestep = tuple[float, ...]

_FAR = 10.0
"""A step this many times the largest so far is no step of the same generation: a cancelled one was left."""


@dataclass
class Stream:
    """Caches of one stream and, for each part, at which positions its last two full steps were."""

    state: dict[str, Tensor]
    full_at: list[list[float]] = field(default_factory=lambda: [[], []])
    last_full: list[int] = field(default_factory=lambda: [-1, -1])
    """For each part, the number of the last step that computed it anew; -1 where the caches hold nothing."""
    capacity: int | None = None
    graphs: dict[StepKind, Any] = field(default_factory=dict)
    """Steps that were recorded over these caches (runtime.cuda_graphs); they go with them."""
    home: Hashable = None
    """Where the caches were made: only there may another generation use their memory."""

    @property
    def empty(self) -> bool:
        """Whether the caches hold nothing that may be used."""
        return not any(self.full_at)

    def emptied(self, capacity: int | None) -> Stream:
        """A stream in the memory of this one, whose recorded steps go on to serve."""
        return Stream(self.state, capacity=capacity, graphs=self.graphs, home=self.home)

    def clock(self, place: float) -> list[list[float]]:
        """For each part: how far a forecast reaches, in intervals between full steps; 1 after a full step."""
        return [[_reach(at, place), float(len(at) >= 1)] for at in self.full_at]

    def passed(self, fresh: Fresh, number: int, place: float) -> None:
        """Note that step `number` at `place` computed the parts of `fresh`."""
        for part, was_fresh in ((ATTENTION, fresh.attention), (EXPERTS, fresh.experts)):
            if was_fresh:
                self.full_at[part] = [*self.full_at[part][-1:], place]
                self.last_full[part] = number

    def invalidate(self) -> None:
        """Trust none of the caches: a step was interrupted while it changed them."""
        self.full_at, self.last_full = [[], []], [-1, -1]


def _reach(full_at: Sequence[float], position: float) -> float:
    if len(full_at) < 2 or full_at[1] == full_at[0]:
        return 0.0
    return (position - full_at[1]) / (full_at[1] - full_at[0])


@dataclass
class Generation:
    """One generation: its streams, and where in time it stands."""

    streams: OrderedDict[Hashable, Stream] = field(default_factory=OrderedDict)
    """The least recently used first."""
    timestep: Timestep | None = None
    direction: float = 0.0
    number: int = -1
    calls: int = 0
    """Calls at the current timestep so far."""
    first_calls: int = 0
    """Calls at the first timestep."""
    largest: float = 0.0
    """The largest step in time so far."""
    dropped: set[Hashable] = field(default_factory=set)
    """Streams that had to make room for others."""

    def restarts_at(self, timestep: Timestep | None) -> bool:
        """Whether a call at `timestep` belongs to a new generation: time jumps back, or far ahead."""
        if timestep is None or self.timestep is None or timestep == self.timestep:
            return False
        step = timestep[0] - self.timestep[0]
        return step * self.direction < 0 or (self.largest > 0 and abs(step) > _FAR * self.largest)

    def advance(self, timestep: Timestep | None) -> Hashable:
        """Take note of a call at `timestep`; returns the key of its stream."""
        if self.number < 0 or timestep is None or timestep != self.timestep:
            if timestep is not None and self.timestep is not None:
                step = timestep[0] - self.timestep[0]
                self.direction, self.largest = self.direction or step, max(self.largest, abs(step))
            self.timestep, self.number, self.calls = timestep, self.number + 1, 0
        self.calls += 1
        self.first_calls += self.number == 0
        return scope.current_stream() or self.calls - 1

    @property
    def certain(self) -> bool:
        """Whether streams can be told from repeated calls.

        Several calls at the first timestep are streams, or a call tried and then made in earnest; after the next
        step the number of calls tells, so that step computes all anew.
        """
        named = scope.in_scope() or scope.current_stream() is not None
        return named or self.number != 1 or self.first_calls == 1


@dataclass(frozen=True)
class Position:
    """Where a call stands: its stream, its step number, and its place on the time axis."""

    stream: Stream
    number: int
    place: float
    generation: Generation
    certain: bool


class Sessions:
    """The generations under way at one input shape; what is unused for longest is dropped first."""

    def __init__(self, config: MoecaConfig, specs: Sequence[CacheSpec], device: torch.device) -> None:
        self.config, self.specs, self.device = config, specs, device
        self.generations: OrderedDict[tuple[object, ...], Generation] = OrderedDict()
        self.recycles = config.cuda_graphs and device.type == "cuda"
        """Whether a stream is given the memory of one that has ended: recorded steps know it by its place."""
        self.spare: list[tuple[Hashable, Stream]] = []
        """Streams of ended generations and their names, while there is room."""
        self.crowded = False
        """Whether a stream came back after its caches were dropped to make room: then they are never of use."""
        self.cut_short = 0
        """How many generations in a row ended after a step or two: time that goes back and forth looks so."""
        self._lock = threading.RLock()
        scope.at_end(self)

    def enter(self, timestep: Timestep | None) -> Position:
        """The position of the call that is about to run."""
        # An inference tensor cannot be changed outside inference mode, so the two never share caches.
        key = (*scope.current_generation(), torch.is_inference_mode_enabled())
        with self._lock:
            generation = self.generations.get(key)
            if generation is None or (not scope.in_scope() and generation.restarts_at(timestep)):
                self.cut_short = self.cut_short + 1 if generation is not None and generation.number <= 1 else 0
                generation = self.generations[key] = self._renewed(generation)
            self.generations.move_to_end(key)
            stream = self._stream(generation, generation.advance(timestep))
            self._make_room()
        place = timestep[0] if timestep is not None else float(generation.number)
        return Position(stream, generation.number, place, generation, generation.certain)

    def _stream(self, generation: Generation, name: Hashable) -> Stream:
        if name not in generation.streams:
            self.crowded |= name in generation.dropped
            generation.streams[name] = self._vacant(name)
        generation.streams.move_to_end(name)
        return generation.streams[name]

    def _vacant(self, name: Hashable) -> Stream:
        """A stream whose caches hold nothing, if it can be in the memory of one that has ended, best of its name."""
        home = self._home()
        fitting = [(other == name, i) for i, (other, stream) in enumerate(self.spare) if stream.home == home]
        if not fitting:
            return Stream(self._allocate(), home=home)
        alike, place = max(fitting)
        stream = self.spare.pop(place)[1]
        return stream.emptied(stream.capacity if alike else None)

    def _home(self) -> Hashable:
        """Memory of one CUDA stream may be in use there when another one writes to it."""
        queue = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        return torch.is_inference_mode_enabled(), queue

    def _make_room(self) -> None:
        """Keep no more than `max_generations` streams; the one in use is the last to go, spare ones go first."""
        live = sum(len(g.streams) for g in self.generations.values())
        del self.spare[: max(0, live + len(self.spare) - self.config.max_generations)]
        while sum(len(g.streams) for g in self.generations.values()) > self.config.max_generations:
            key, oldest = next(iter(self.generations.items()))
            oldest.dropped.add(oldest.streams.popitem(last=False)[0])
            if not oldest.streams:
                del self.generations[key]

    def due(self, position: Position) -> Fresh:
        """Which parts the call computes anew."""
        if not position.certain:
            return Fresh(True, True)
        attention, experts = (self._since(position, last) for last in position.stream.last_full)
        return Fresh(any(due.attention for due in attention), any(due.experts for due in experts))

    def _since(self, position: Position, last: int) -> list[Fresh]:
        """What was due at the steps after `last`: a stream that was not called at one of them makes up for it."""
        if last < 0:
            return [Fresh(True, True)]
        return [fresh_parts(self.config, number) for number in range(last + 1, position.number + 1)]

    def interrupted(self, position: Position) -> None:
        """The call at `position` did not end: its caches are not to be used, and it may be made again."""
        position.stream.invalidate()
        position.generation.calls -= 1
        position.generation.first_calls -= position.number == 0

    def drop_ended(self) -> None:
        """Drop the caches of generations whose context has ended."""
        with self._lock:
            for key in [key for key in self.generations if scope.ended(key)]:
                ended = self.generations.pop(key)
                if self.recycles:
                    self.spare += ended.streams.items()

    def reset(self) -> None:
        """Drop all caches."""
        with self._lock:
            self.generations.clear()
            self.spare.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, spare ones among them."""
        streams = [s for g in self.generations.values() for s in g.streams.values()]
        streams += [stream for _, stream in self.spare]
        return sum(tensor.nbytes for stream in streams for tensor in stream.state.values())

    def _allocate(self) -> dict[str, Tensor]:
        return {spec.name: torch.zeros(spec.shape, dtype=spec.dtype, device=self.device) for spec in self.specs}

    def _renewed(self, old: Generation | None) -> Generation:
        """A new generation; its streams start with the capacities of the last one's, and with empty caches."""
        fresh = Generation()
        for name, stream in (old.streams if old else {}).items():
            if self.recycles:
                fresh.streams[name] = stream.emptied(stream.capacity)
            else:
                fresh.streams[name] = Stream(self._allocate(), capacity=stream.capacity)
        return fresh
