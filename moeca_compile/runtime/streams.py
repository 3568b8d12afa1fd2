"""The caches of streams: those of one graph at one set of input shapes, within the bounds of the whole model."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch

from moeca_compile.config import MoecaConfig
from moeca_compile.notes import Notes
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part
from moeca_compile.policies.criterion import Criterion, Memory
from moeca_compile.policies.forecast import LINEAR, Rule, rule_of, slot_weights
from moeca_compile.runtime.error_control import ErrorControl
from moeca_compile.runtime.requests import Requests
from moeca_compile.runtime.schedule import EVERYTHING, RefreshPlan, Schedule
from moeca_compile.runtime.seen_sampler import SeenSampler
from moeca_compile.runtime.tracks import Position, Track
from moeca_compile.text import binary_bytes

_uses = itertools.count(1)
_MANY_SHORT = 8
"""After this many very short generations in a row, warn that generations are not being detected."""


@dataclass
class Stream:
    """The caches of one stream, with the times of the last full steps of each part of the model."""

    state: Caches
    rule: Rule = LINEAR
    """How values are forecast."""
    full_at: list[list[float]] = field(default_factory=lambda: [[], []])
    """For each part, the times of its last full steps, the newest first: as many as a forecast reads."""
    full_numbers: list[list[int]] = field(default_factory=lambda: [[], []])
    """For each part, the numbers of these steps."""
    passed: list[float] = field(default_factory=list)
    """The times of the cache steps since the last full step."""
    capacity: int | None = None
    """The capacity bucket of its cache steps; None before the first."""
    graphs: dict[Any, Any] = field(default_factory=dict)
    """CUDA graphs that were recorded over these caches (runtime.cuda_graphs); dropped together with them."""
    traced: dict[Any, Any] = field(default_factory=dict)
    """Where steps are traced, some elements of what regions gave at the last steps that computed them."""
    used: int = 0
    """When it was called last, as a count of all calls."""
    criterion: Criterion | None = None
    """Decides by the data which of its steps are full; None where step numbers do."""
    alike: bool | None = None
    """Whether the other ranks do the same at its steps (runtime.ranks); None before the first."""
    allocated_by: Hashable = None
    """Inference mode and CUDA stream under which the caches were allocated; they are only recycled under the same."""

    @property
    def last_full(self) -> list[int]:
        """For each part, the number of the last step that computed it anew; -1 where none has."""
        return [numbers[0] if numbers else -1 for numbers in self.full_numbers]

    @property
    def empty(self) -> bool:
        """Whether the caches hold no valid values."""
        return not any(self.full_at)

    def emptied(self, capacity: int | None, criterion: Criterion | None) -> Stream:
        """A new stream without valid values in the memory of this one. Recorded steps remain usable."""
        self.state.filled = [0, 0]
        return Stream(
            self.state,
            self.rule,
            capacity=capacity,
            graphs=self.graphs,
            criterion=criterion,
            allocated_by=self.allocated_by,
        )

    def weights(self, number: int, time: float) -> list[list[list[float]]]:
        """The forecast weights (2, K, K) of a step, for attention and experts (policies.forecast)."""
        full: Sequence[Sequence[float]] = self.full_numbers if self.rule.by_number else self.full_at
        now, filled = number if self.rule.by_number else time, self.state.filled
        return [slot_weights(self.rule, at, count, now) for at, count in zip(full, filled, strict=True)]

    def note_refreshed(self, refresh: RefreshPlan, number: int, time: float) -> None:
        """Record that step `number` at `time` computed these parts anew."""
        if refresh == EVERYTHING:
            self.passed = []
        else:
            self.passed.append(time)
        for part, refreshed in ((Part.ATTENTION, refresh.attention), (Part.EXPERTS, refresh.experts)):
            if refreshed:
                row = part.row
                self.full_at[row] = [time, *self.full_at[row]][: self.rule.slots]
                self.full_numbers[row] = [number, *self.full_numbers[row]][: self.rule.slots]
                self.state.filled[row] += 1

    def invalidate(self) -> None:
        """Mark all caches as invalid: a step was interrupted while it changed them, or they may be another's."""
        self.full_at, self.full_numbers, self.passed = [[], []], [[], []], []
        self.state.filled = [0, 0]
        if self.criterion is not None:
            self.criterion.forget()
        self.traced.clear()


class Bounds:
    """Bounds the caches of one model, over all its graphs and shapes: those used the longest ago are dropped first.

    Args:
        requests: those of the model.
        most_streams, most_bytes: how many streams may have caches, and how many bytes they may take; None for any.
            Streams of ended requests that wait for new ones count too.
    """

    def __init__(self, requests: Requests, most_streams: int, most_bytes: int | None) -> None:
        self.requests, self.most_streams, self.most_bytes = requests, most_streams, most_bytes
        self.owners: WeakSet[Streams] = WeakSet()

    @property
    def count(self) -> int:
        return sum(len(owner.held()) for owner in list(self.owners))

    def make_room(self, wanted: int) -> None:
        """Drop caches until a stream of so many bytes fits. One always does."""
        while self._over(wanted):
            owners = list(self.owners)
            spare = next((owner.spare for owner in owners if owner.spare), None)
            if spare is not None:
                spare.pop(0)
                continue
            oldest = min((track for owner in owners for track in owner.tracks()), key=lambda t: t.caches.used)
            oldest.caches, oldest.crowded_out = None, True

    def _over(self, wanted: int) -> bool:
        count = self.count
        held = sum(owner.stream_bytes * len(owner.held()) for owner in list(self.owners))
        return count > 0 and (
            count >= self.most_streams or (self.most_bytes is not None and held + wanted > self.most_bytes)
        )


def bounds_of(config: MoecaConfig) -> Bounds:
    """The bounds that the options set, for a model without requests so far."""
    most = config.max_cache_bytes
    # Requests beyond those with caches are kept for a while, so that a warning can say that they lost theirs.
    requests = Requests(4 * config.max_generations, config.usual_steps)
    return Bounds(requests, config.max_generations, most if isinstance(most, int) else None)


OTHER_STEPS = (
    "the full steps were tuned for generations of {0} steps, and yours have another number. They are spread alike "
    "over as many as are expected, and come every full_every steps beyond. Pictures may be worse than they could be: "
    "tune with your number of steps (moeca_compile.tune)"
)


class Streams:
    """The streams of one graph at one set of input shapes.

    Args:
        bounds: those of the model.
        config, parts: the schedule, and what it is for.
        specs: what a stream caches; device: where.
    """

    def __init__(
        self, bounds: Bounds, config: MoecaConfig, specs: Sequence[CacheSpec], parts: Set[Part], device: torch.device
    ) -> None:
        self.bounds, self.requests, self.specs, self.device = bounds, bounds.requests, specs, device
        self.config, self.schedule = config, Schedule(config, parts)
        self.decides, self.follows_sampler = config.policy.decides, "sampler" in config.policy.options
        self.sees_sampler = self.follows_sampler and config.sampler is None
        """Whether it asks each generation what its sampler is."""
        self.recycles = config.records_on(device)
        """Whether new streams reuse the memory of ended ones, as CUDA graphs need: they read caches by address."""
        self.spare: list[tuple[Hashable, Stream]] = []
        """Streams of ended requests with their names, if this recycles."""
        self.capacities: dict[Hashable, int | None] = {}
        """The capacity that the last stream of each name had."""
        self.memories: dict[Hashable, Memory] = {}
        """What criteria keep for the next stream of each name."""
        self.crowded = False
        """Whether a stream was called again after its caches had been dropped for those of others."""
        self.stream_bytes = sum(spec.nbytes for spec in specs)
        """Bytes of the caches of one stream."""
        bounds.owners.add(self)

    # --- a call -------------------------------------------------------------------------------------------------

    def of(self, position: Position) -> Stream:
        """The stream of a call. Where it is not certain whose caches these are, they are no longer valid."""
        track = position.track
        with self.requests.lock:
            if track.caches is None:
                self.crowded |= track.crowded_out
                track.caches = self._new_stream(position.request.name_of(track))
            elif not position.certain:
                track.caches.invalidate()
            track.caches.used = next(_uses)
            if self.follows_sampler:
                track.caches.rule = rule_of(self.config, self.deterministic(position) is False)
            stream: Stream = track.caches
            return stream

    def deterministic(self, position: Position) -> bool | None:
        """Whether a call's sampler is; None where nothing says, or the recipe makes nothing of it."""
        if not self.follows_sampler:
            return None
        told = self.config.sampler
        if told is not None:
            return told == "deterministic"
        with self.requests.lock:  # other streams of the request may just see their pictures
            return position.request.deterministic

    def see_sampler(self, position: Position, picture: Any, outputs: Sequence[Any]) -> None:
        """Note what the model made of a picture, where the generation is not told what its sampler is."""
        if position.request.told is None:
            with self.requests.lock:
                position.request.sampler = position.request.sampler or SeenSampler()
                position.request.sampler.note(position.number, picture, outputs)

    def refresh_plan(self, position: Position, stream: Stream) -> RefreshPlan:
        """Which parts the call computes anew."""
        if not position.certain:
            return EVERYTHING
        attention_at, experts_at = stream.last_full
        return self.schedule.parts_to_refresh(attention_at, experts_at, position.number, position.request.expected)

    def warn_if_caches_unused(self, notes: Notes) -> None:
        """Warn if generations are detected, but their caches are hardly ever used."""
        if self.crowded:
            option = "max_generations" if self.bounds.count >= self.bounds.most_streams else "max_cache_bytes"
            notes.warn(
                "caches were dropped before they were used again, because more streams alternate than "
                f"{option} = {getattr(self.config, option)} allows. So most steps are full steps. Raise {option}; "
                f"each stream needs {binary_bytes(self.stream_bytes)} for its caches"
            )
        if self.requests.strayed:
            notes.warn(
                f"{self.requests.strayed} read the caches of another picture, which is known a step later on an "
                "accelerator. Requests with equal arguments took turns, or a stream was not told from another: mark "
                "them with moeca_compile.generation() and moeca_compile.stream(name)"
            )
        if self.requests.short >= _MANY_SHORT:
            notes.warn(
                f"each of the last {_MANY_SHORT} generations ended after one or two steps, because the timestep went "
                "back or jumped. So most steps are full steps. If your sampler does that (churn, restarts), mark "
                "each generation: with moeca_compile.generation(): ..."
            )

    def warn_if_other_steps(self, position: Position, notes: Notes) -> None:
        """Warn if generations have another number of steps than the options were made for."""
        steps = self.requests.unusual(position.request)
        if steps is not None:
            notes.warn(OTHER_STEPS.format(self.requests.usual))

    def finished(self, position: Position) -> None:
        """A call has run. If that was the last step of its generation, the stream's caches are dropped."""
        steps = position.request.steps
        if steps is not None and position.number >= steps - 1:
            with self.requests.lock:
                self.requests.release(position.request, position.track)

    # --- memory -------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, including spare ones."""
        # Copies, since another thread may run a step meanwhile.
        return sum(tensor.nbytes for stream in self.held() for tensor in list(stream.state.values()))

    def held(self) -> list[Stream]:
        """All streams that have caches here, spare ones included."""
        return [*(track.caches for track in self.tracks()), *(stream for _, stream in list(self.spare))]

    def tracks(self) -> list[Track]:
        """The tracks that have caches here."""
        tracks = [track for request in list(self.requests.live.values()) for track in list(request.tracks)]
        return [track for track in tracks if track.owner is self and track.caches is not None]

    def take_back(self, name: Hashable, caches: Stream) -> None:
        """Keep the capacity of a stream that has ended and, if this recycles, its memory."""
        self.capacities[name] = caches.capacity
        if self.recycles:
            self.spare.append((name, caches))

    def drop(self) -> None:
        """Drop all caches."""
        with self.requests.lock:
            self.spare.clear()
            for track in self.tracks():
                track.caches = None

    def new_caches(self) -> Caches:
        """Caches for one stream, which are allocated when they are first used."""
        return Caches(self.specs, self.device)

    def _new_stream(self, name: Hashable) -> Stream:
        """A stream without valid values, in the memory of an ended one (preferably of that name) if there is any."""
        allocator = self._allocator()
        criterion = self._criterion(name)
        fitting = [(other == name, i) for i, (other, s) in enumerate(self.spare) if s.allocated_by == allocator]
        if not fitting:
            self.bounds.make_room(self.stream_bytes)
            capacity = self.capacities.get(name)
            return Stream(
                self.new_caches(),
                rule_of(self.config),
                capacity=capacity,
                criterion=criterion,
                allocated_by=allocator,
            )
        same_name, index = max(fitting)
        stream = self.spare.pop(index)[1]
        return stream.emptied(stream.capacity if same_name else None, criterion)

    def _criterion(self, name: Hashable) -> Criterion | None:
        if self.config.max_error is not None:
            return ErrorControl(self.config, self.schedule.full_steps)
        if self.decides is not None:
            return self.decides.criterion(self.config, self.memories.setdefault(name, {}))
        return None

    def _allocator(self) -> Hashable:
        """Inference mode and CUDA stream: one stream must not write to memory that another may still be using."""
        queue = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        return torch.is_inference_mode_enabled(), queue
