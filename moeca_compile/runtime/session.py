"""Generations, steps and streams, detected from the timesteps of the calls (or marked by the user, runtime.scope).

- The same timestep as the last call: the next stream of the same step (conditional and unconditional passes).
- A timestep further on in the same direction: the next step.
- A timestep that jumps back: the first step of a new generation.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch

from moeca_compile.config import MoecaConfig
from moeca_compile.notes import Notes
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part
from moeca_compile.policies import forecast
from moeca_compile.policies.forecast import slot_weights
from moeca_compile.runtime import scope
from moeca_compile.runtime.schedule import EVERYTHING, RefreshPlan, Schedule
from moeca_compile.runtime.timesteps import Timestep
from moeca_compile.text import binary_bytes

_MANY_SHORT = 8
"""After this many very short generations in a row, warn that generations are not being detected."""

_FAR = 10.0
"""A change of the timestep this many times the largest so far starts a new generation: the last was cancelled."""


@dataclass
class Stream:
    """The caches of one stream, with the times of the last full steps of each part of the model."""

    state: Caches
    full_at: list[list[float]] = field(default_factory=lambda: [[], []])
    """For each part, the times of its last full steps, the newest first: as many as a forecast reads."""
    last_full: list[int] = field(default_factory=lambda: [-1, -1])
    """For each part, the number of the last step that computed it anew; -1 where none has."""
    capacity: int | None = None
    """The capacity bucket of its cache steps; None before the first."""
    graphs: dict[Any, Any] = field(default_factory=dict)
    """CUDA graphs that were recorded over these caches (runtime.cuda_graphs); dropped together with them."""
    allocated_by: Hashable = None
    """Inference mode and CUDA stream under which the caches were allocated; they are only recycled under the same."""

    @property
    def empty(self) -> bool:
        """Whether the caches hold no valid values."""
        return not any(self.full_at)

    def emptied(self, capacity: int | None) -> Stream:
        """A new stream without valid values in the memory of this one. Recorded steps remain usable."""
        self.state.filled = [0, 0]
        return Stream(self.state, capacity=capacity, graphs=self.graphs, allocated_by=self.allocated_by)

    def weights(self, time: float) -> list[list[list[float]]]:
        """The forecast weights (2, K, K) of a step at `time`, for attention and experts (policies.forecast)."""
        return [slot_weights(at, filled, time) for at, filled in zip(self.full_at, self.state.filled, strict=True)]

    def note_refreshed(self, refresh: RefreshPlan, number: int, time: float) -> None:
        """Record that step `number` at `time` computed these parts anew."""
        for part, refreshed in ((Part.ATTENTION, refresh.attention), (Part.EXPERTS, refresh.experts)):
            if refreshed:
                self.full_at[part.row] = [time, *self.full_at[part.row]][: forecast.RULE.slots]
                self.last_full[part.row] = number
                self.state.filled[part.row] += 1

    def invalidate(self) -> None:
        """Mark all caches as invalid, because a step was interrupted while it changed them."""
        self.full_at, self.last_full = [[], []], [-1, -1]
        self.state.filled = [0, 0]


def _most_streams(config: MoecaConfig, stream_bytes: int) -> int:
    """How many streams max_generations and a number of max_cache_bytes allow; one always."""
    if not isinstance(config.max_cache_bytes, int) or not stream_bytes:
        return config.max_generations
    return max(1, min(config.max_generations, config.max_cache_bytes // stream_bytes))


@dataclass
class Generation:
    """One generation: its streams, and the timestep and step number that it has reached."""

    streams: OrderedDict[Hashable, Stream] = field(default_factory=OrderedDict)
    """The least recently used first."""
    timestep: Timestep | None = None
    direction: float = 0.0
    """Its sign says whether the timestep grows or falls; 0 while that is not known."""
    number: int = -1
    """Number of the current step, from 0; -1 before the first call."""
    calls: int = 0
    """Calls at the current timestep so far."""
    first_calls: int = 0
    """Calls at the first timestep."""
    largest: float = 0.0
    """The largest change of the timestep between two steps so far."""
    dropped: set[Hashable] = field(default_factory=set)
    """Names of streams whose caches were dropped for those of others."""

    def restarts_at(self, timestep: Timestep | None) -> bool:
        """Whether a call at `timestep` starts a new generation: the timestep jumps back, or far ahead."""
        if timestep is None or self.timestep is None or timestep == self.timestep:
            return False
        step = timestep[0] - self.timestep[0]
        return step * self.direction < 0 or (self.largest > 0 and abs(step) > _FAR * self.largest)

    def advance(self, timestep: Timestep | None) -> Hashable:
        """Register a call at `timestep`; returns the key of its stream."""
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
        """Whether the streams of this step are known.

        Several calls at the first timestep are several streams, or trial calls before the real one. The number of
        calls at the second step shows which, so that step computes everything anew.
        """
        named = scope.in_scope() or scope.current_stream() is not None
        return named or self.number != 1 or self.first_calls == 1


@dataclass(frozen=True)
class Position:
    """The stream, step number and time of a call, and whether its stream is `certain` (Generation.certain)."""

    stream: Stream
    number: int
    time: float
    generation: Generation
    certain: bool


class Sessions:
    """The live generations at one input shape; the least recently used is dropped first."""

    def __init__(
        self, config: MoecaConfig, specs: Sequence[CacheSpec], parts: Set[Part], device: torch.device
    ) -> None:
        self.config, self.specs, self.device = config, specs, device
        self.schedule = Schedule(config, parts)
        self.generations: OrderedDict[tuple[object, ...], Generation] = OrderedDict()
        self.most_streams = _most_streams(config, self.stream_bytes)
        """How many streams may have caches, spare ones included."""
        self.recycles = config.records_on(device)
        """Whether new streams reuse the memory of ended ones, as CUDA graphs need: they read caches by address."""
        self.spare: list[tuple[Hashable, Stream]] = []
        """Streams of ended generations with their names, up to `most_streams` together with the live ones."""
        self.evicting_live_streams = False
        """Whether a stream was called again after its caches had been dropped for those of others."""
        self.short_generations = 0
        """How many generations in a row ended after one or two steps, as when the timestep goes back and forth."""
        self._lock = threading.RLock()
        scope.at_end(self)

    def enter(self, timestep: Timestep | None) -> Position:
        """The position of the call that is about to run."""
        # Inference tensors cannot be changed outside inference mode, so caches are not shared between the modes.
        key = (*scope.current_generation(), torch.is_inference_mode_enabled())
        with self._lock:
            generation = self.generations.get(key)
            if generation is None or (not scope.in_scope() and generation.restarts_at(timestep)):
                self.short_generations = (
                    self.short_generations + 1 if generation is not None and generation.number <= 1 else 0
                )
                generation = self.generations[key] = self._renewed(generation)
            self.generations.move_to_end(key)
            stream = self._stream(generation, generation.advance(timestep))
        time = timestep[0] if timestep is not None else float(generation.number)
        return Position(stream, generation.number, time, generation, generation.certain)

    def _stream(self, generation: Generation, name: Hashable) -> Stream:
        if name not in generation.streams:
            self.evicting_live_streams |= name in generation.dropped
            self._make_room()
            generation.streams[name] = self._new_stream(name)
        generation.streams.move_to_end(name)
        return generation.streams[name]

    def _new_stream(self, name: Hashable) -> Stream:
        """A stream without valid values, in the memory of an ended one (preferably of that name) if there is any."""
        allocator = self._allocator()
        fitting = [
            (other == name, i) for i, (other, stream) in enumerate(self.spare) if stream.allocated_by == allocator
        ]
        if not fitting:
            del self.spare[: max(0, self._live + 1 + len(self.spare) - self.most_streams)]
            return Stream(self.new_caches(), allocated_by=allocator)
        same_name, index = max(fitting)
        stream = self.spare.pop(index)[1]
        return stream.emptied(stream.capacity if same_name else None)

    def _allocator(self) -> Hashable:
        """Inference mode and CUDA stream: one stream must not write to memory that another may still be using."""
        queue = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        return torch.is_inference_mode_enabled(), queue

    def _make_room(self) -> None:
        """Drop the least recently used streams until one more may live."""
        while self._live >= self.most_streams:
            key, oldest = next((key, each) for key, each in self.generations.items() if each.streams)
            oldest.dropped.add(oldest.streams.popitem(last=False)[0])
            if not oldest.streams and key != next(reversed(self.generations)):  # the last one is being called
                del self.generations[key]

    @property
    def _live(self) -> int:
        return sum(len(generation.streams) for generation in self.generations.values())

    def refresh_plan(self, position: Position) -> RefreshPlan:
        """Which parts the call computes anew."""
        if not position.certain:
            return EVERYTHING
        attention_at, experts_at = position.stream.last_full
        return self.schedule.parts_to_refresh(attention_at, experts_at, position.number)

    def warn_if_caches_unused(self, notes: Notes) -> None:
        """Warn if generations are detected, but their caches are hardly ever used."""
        if self.evicting_live_streams:
            option = "max_generations" if self.most_streams == self.config.max_generations else "max_cache_bytes"
            notes.warn(
                "caches were dropped before they were used again, because more streams alternate than "
                f"{option} = {getattr(self.config, option)} allows. So most steps are full steps. Raise {option}; "
                f"each stream needs {binary_bytes(self.stream_bytes)} for its caches"
            )
        if self.short_generations >= _MANY_SHORT:
            notes.warn(
                f"each of the last {_MANY_SHORT} generations ended after one or two steps, because the timestep went "
                "back or jumped. So most steps are full steps. If your sampler does that (churn, restarts), mark "
                "each generation: with moeca_compile.generation(): ..."
            )

    def interrupted(self, position: Position) -> None:
        """The call at `position` raised: its caches are invalid, and it is not counted, as it may be repeated."""
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
    def stream_bytes(self) -> int:
        """Bytes of the caches of one stream."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, including spare ones."""
        # Copies, since another thread may run a step meanwhile.
        streams = [s for g in list(self.generations.values()) for s in list(g.streams.values())]
        streams += [stream for _, stream in list(self.spare)]
        return sum(tensor.nbytes for stream in streams for tensor in list(stream.state.values()))

    def new_caches(self) -> Caches:
        """Caches for one stream, which are allocated when they are first used."""
        return Caches(self.specs, self.device)

    def _renewed(self, old: Generation | None) -> Generation:
        """A new generation with the streams of the old one, their capacities, and no valid values."""
        fresh = Generation()
        for name, stream in (old.streams if old else {}).items():
            if self.recycles:
                fresh.streams[name] = stream.emptied(stream.capacity)
            else:
                fresh.streams[name] = Stream(self.new_caches(), capacity=stream.capacity)
        return fresh
