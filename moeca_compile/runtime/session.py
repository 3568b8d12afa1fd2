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

import torch
from torch import Tensor

from moeca_compile.config import MoecaConfig
from moeca_compile.policies.step import ATTENTION, EXPERTS, CacheSpec
from moeca_compile.runtime import scope
from moeca_compile.runtime.schedule import Fresh, fresh_parts

Timestep = tuple[float, ...]


@dataclass
class Stream:
    """Caches of one stream and, for each part, at which positions its last two full steps were."""

    state: dict[str, Tensor]
    full_at: list[list[float]] = field(default_factory=lambda: [[], []])
    capacity: int | None = None

    def fresh(self, due: Fresh) -> Fresh:
        """What is computed anew: what is due, and whatever has no cache to stand on."""
        return Fresh(due.attention or not self.full_at[ATTENTION], due.experts or not self.full_at[EXPERTS])

    def clock(self, position: float) -> list[list[float]]:
        """For each part: how far a forecast reaches, in intervals between full steps; 1 after two of them."""
        return [[_reach(at, position), float(len(at) >= 1)] for at in self.full_at]

    def passed(self, fresh: Fresh, position: float) -> None:
        """Note that the parts of `fresh` were computed at `position`."""
        for part, was_fresh in ((ATTENTION, fresh.attention), (EXPERTS, fresh.experts)):
            if was_fresh:
                self.full_at[part] = [*self.full_at[part][-1:], position]


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

    def restarts_at(self, timestep: Timestep | None) -> bool:
        """Whether a call at `timestep` belongs to a new generation: time jumps back."""
        if timestep is None or self.timestep is None or timestep == self.timestep:
            return False
        return (timestep[0] - self.timestep[0]) * self.direction < 0

    def advance(self, timestep: Timestep | None) -> Hashable:
        """Take note of a call at `timestep`; returns the key of its stream."""
        if self.number < 0 or timestep is None or timestep != self.timestep:
            if timestep is not None and self.timestep is not None and not self.direction:
                self.direction = timestep[0] - self.timestep[0]
            self.timestep, self.number, self.calls = timestep, self.number + 1, 0
        self.calls += 1
        return scope.current_stream() or self.calls - 1


@dataclass(frozen=True)
class Position:
    """Where a call stands: its stream, its step number, and its place on the time axis."""

    stream: Stream
    number: int
    place: float


class Sessions:
    """The generations under way at one input shape; what is unused for longest is dropped first."""

    def __init__(self, config: MoecaConfig, specs: Sequence[CacheSpec], device: torch.device) -> None:
        self.config, self.specs, self.device = config, specs, device
        self.generations: OrderedDict[tuple[object, ...], Generation] = OrderedDict()
        self._lock = threading.RLock()
        scope.at_end(self)

    def enter(self, timestep: Timestep | None) -> Position:
        """The position of the call that is about to run."""
        # An inference tensor cannot be changed outside inference mode, so the two never share caches.
        key = (*scope.current_generation(), torch.is_inference_mode_enabled())
        with self._lock:
            generation = self.generations.get(key)
            if generation is None or (not scope.in_scope() and generation.restarts_at(timestep)):
                generation = self.generations[key] = self._renewed(generation)
            self.generations.move_to_end(key)
            stream = self._stream(generation, generation.advance(timestep))
            self._make_room()
        place = timestep[0] if timestep is not None else float(generation.number)
        return Position(stream, generation.number, place)

    def _stream(self, generation: Generation, name: Hashable) -> Stream:
        if name not in generation.streams:
            generation.streams[name] = Stream(self._allocate())
        generation.streams.move_to_end(name)
        return generation.streams[name]

    def _make_room(self) -> None:
        """Keep no more than `max_generations` streams; the one in use is the last to go."""
        while sum(len(g.streams) for g in self.generations.values()) > self.config.max_generations:
            key, oldest = next(iter(self.generations.items()))
            oldest.streams.popitem(last=False)
            if not oldest.streams:
                del self.generations[key]

    def due(self, position: Position) -> Fresh:
        """Which parts the call computes anew."""
        return position.stream.fresh(fresh_parts(self.config, position.number))

    def drop_ended(self) -> None:
        """Drop the caches of generations whose context has ended."""
        with self._lock:
            for key in [key for key in self.generations if scope.ended(key)]:
                del self.generations[key]

    def reset(self) -> None:
        """Drop all caches."""
        with self._lock:
            self.generations.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all live caches."""
        streams = [s for g in self.generations.values() for s in g.streams.values()]
        return sum(tensor.nbytes for stream in streams for tensor in stream.state.values())

    def _allocate(self) -> dict[str, Tensor]:
        return {spec.name: torch.zeros(spec.shape, dtype=spec.dtype, device=self.device) for spec in self.specs}

    def _renewed(self, old: Generation | None) -> Generation:
        """A new generation on the memory of the last one."""
        fresh = Generation()
        for name, stream in (old.streams if old else {}).items():
            for tensor in stream.state.values():
                tensor.zero_()
            fresh.streams[name] = Stream(stream.state, capacity=stream.capacity)
        return fresh
