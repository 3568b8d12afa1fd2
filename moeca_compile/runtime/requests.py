"""Which request, stream and step a call belongs to, told by what the call brings.

A *request* is one generation. Its *tracks* are its streams: conditional and unconditional passes, or passes of other
sizes. All graphs and shapes of a model share its requests, and so one count of steps. A call belongs to
- the request whose handle is entered (runtime.scope), else the one that it continues: its time moves on, its
  arguments are those of one of the request's tracks, and its picture goes on from that track's last one;
- a new request where it continues none.

What nobody can tell is *uncertain*: that step computes everything anew and reads nothing of what was cached before.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from moeca_compile.runtime import scope
from moeca_compile.runtime.arguments import Marks, compare
from moeca_compile.runtime.continuation import Answer, Moves, Trajectory
from moeca_compile.runtime.scope import Generation
from moeca_compile.runtime.timesteps import Timestep

_FAR = 10.0
"""A change of the timestep this many times the largest so far starts a new request: the last was cancelled."""
_MOST_TRACKS = 64
"""Calls that always come at one timestep look like streams of one step: so many are told apart."""
_MOST_REQUESTS = 256
"""So many requests are kept: a server may sample each in a thread of its own, without an end that could be seen."""
_REMEMBERED = 4
"""So many requests that gave up their caches for a later one are remembered, to notice if they go on."""


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


@dataclass(frozen=True)
class _Fit:
    """How a call fits a request."""

    step: float
    """How far it moves on (Request.moved)."""
    track: Track | None = None
    """None if it begins a track."""
    answer: Answer = Answer.UNKNOWN
    """How its picture relates to the track's last one, or for one that begins, to that of any track."""
    moved: Moves = ()
    same: int = 0
    """How many arguments are surely those of the track."""
    by_order: bool = False
    """Whether nothing but the order of calls tells the track from others."""
    begun_by: frozenset[str] = frozenset()
    here: bool = False
    """Whether the last call came from this thread."""

    @property
    def sure(self) -> bool:
        """Whether it fits by more than its time and its thread."""
        return self.answer in (Answer.GOES_ON, Answer.UNMOVED) or self.same > 0

    @property
    def rank(self) -> tuple[bool, bool, bool, int]:
        return self.answer is Answer.GOES_ON, self.track is not None, self.here, self.same


class Requests:
    """The requests of one model that are under way."""

    def __init__(self) -> None:
        self.live: OrderedDict[int, Request] = OrderedDict()
        """By identity, the least recently used first."""
        self.remembered: deque[Request] = deque(maxlen=_REMEMBERED)
        """Requests that gave up their caches for a later one in their thread."""
        self.interleaved = False
        """Whether unmarked requests have been seen to take turns in one thread: then none gives up its caches."""
        self.direction = 0.0
        """The direction of the last request that moved twice."""
        self.varying: set[str] = set()
        """Arguments that change from step to step, and so do not tell tracks apart."""
        self.short = 0
        """How many unmarked requests in a row ended after one or two steps, as when time goes back and forth."""
        self.strayed = ""
        """The first call that turned out, too late, to have read another picture's caches."""
        self.lock = threading.RLock()
        scope.at_end(self)

    def enter(self, call: Call) -> Position:
        """The position of a call that is about to run."""
        handle = scope.current_generation()
        with self.lock:
            if handle is None:
                scope.note_unmarked_call()
                request, fit = self._continued(call) or self._new(call)
            else:
                handle.calls += 1
                request = self._of(handle)
                fit = self._fit(request, call) or _Fit(1.0)
            self.live.move_to_end(id(request))
            return self._entered(request, fit, call)

    # --- which request ------------------------------------------------------------------------------------------

    def _of(self, handle: Generation) -> Request:
        known = (r for r in self._latest_first() if r.handle is not None and r.handle() is handle)
        return next(known, None) or self._added(Request(weakref.ref(handle)))

    def _latest_first(self) -> list[Request]:
        """A copy: Python may collect a handle, and so end its request, in the middle of a walk."""
        return list(self.live.values())[::-1]

    def _added(self, request: Request) -> Request:
        self.live[id(request)] = request
        if len(self.live) > _MOST_REQUESTS:
            self.end(next(iter(self.live.values())))
        return request

    def _continued(self, call: Call) -> tuple[Request, _Fit] | None:
        """The unmarked request that a call continues, if any."""
        found = self._best((r for r in self._latest_first() if r.handle is None), call)
        if found is None:
            found = self._best(self.remembered, call)
            if found is None or not (found[1].track and found[1].sure):
                return None
            self.interleaved = True
            self.remembered.remove(found[0])
            self._added(found[0])
        return found

    def _best(self, requests: Iterable[Request], call: Call) -> tuple[Request, _Fit] | None:
        fits = [(request, fit) for request in requests if (fit := self._fit(request, call)) is not None]
        return max(fits, key=lambda found: found[1].rank, default=None)

    def _new(self, call: Call) -> tuple[Request, _Fit]:
        """A new request. It takes the place of this thread's last one."""
        thread, unmarked = scope.thread_number(), [r for r in self._latest_first() if r.handle is None]
        last = next((r for r in unmarked if r.tracks[-1].thread == thread), None)
        if last is not None:
            self.short = self.short + 1 if last.number <= 1 else 0
            if not self.interleaved:
                self.end(last)
                self.remembered.append(last)
        return self._added(Request()), _Fit(1.0)

    def end(self, request: Request) -> None:
        """Drop a request; its caches go back to their owners."""
        self.live.pop(id(request), None)
        for track in request.tracks:
            self.release(request, track)

    def release(self, request: Request, track: Track) -> None:
        """Give a track's caches back to their owner."""
        if track.caches is not None:
            track.owner.take_back(request.name_of(track), track.caches)
            track.caches = None

    def drop_ended(self) -> None:
        """Drop the requests that the user has ended."""
        with self.lock:
            for request in [request for request in self._latest_first() if request.ended]:
                self.end(request)

    def reset(self) -> None:
        """Drop all requests and caches."""
        with self.lock:
            self.live.clear()
            self.remembered.clear()

    # --- which track --------------------------------------------------------------------------------------------

    def _fit(self, request: Request, call: Call) -> _Fit | None:
        """How a call fits a request; None if it does not. What a handle marks always fits."""
        marked, step = request.handle is not None, request.moved(call.time)
        if step is None:
            if not marked:
                return None
            step = 1.0
        name, thread = scope.current_stream(), scope.thread_number()
        tracks = [t for t in request.tracks if (t.owner, t.form, t.name) == (call.owner, call.form, name)]
        told = [(track, *compare(call.marks, track.marks, self.varying)) for track in tracks]
        if name is None:
            alike = [(track, same) for track, same, other in told if not other]
        else:
            alike = [(track, same) for track, same, _ in told]
        # A track is called once a step.
        free = [(track, same) for track, same in alike if step or track.number < request.number]
        fits = []
        for track, same in free:
            answer, moved = track.trajectory.look(call.picture)
            fits.append(_Fit(step, track, answer, moved, same, len(alike) > 1, here=track.thread == thread))
        if not marked:
            fits = [fit for fit in fits if fit.answer is not Answer.OTHER and (fit.here or fit.sure)]
        if fits:
            most = max(_likeness(fit) for fit in fits)
            return next(fit for fit in fits if _likeness(fit) == most)
        if free and step and not marked:
            return None
        return self._beginning(request, call, step, [other for _, _, other in told])

    def _beginning(self, request: Request, call: Call, step: float, others: list[set[str]]) -> _Fit | None:
        """How a call fits a request of whose tracks it is none; None if it is no stream of it."""
        answers = {track.trajectory.look(call.picture)[0] for track in request.tracks}
        related = bool(answers & {Answer.GOES_ON, Answer.UNMOVED})
        here = any(track.thread == scope.thread_number() for track in request.tracks)
        begun_by = frozenset(min(others, key=len, default=()))
        # Streams of one request differ in some argument. An equal call of another thread is another request.
        elsewhere = not here and not (related and begun_by)
        if request.handle is None and (elsewhere or (Answer.OTHER in answers and not related)):
            return None
        return _Fit(step, answer=Answer.GOES_ON if related else Answer.UNKNOWN, begun_by=begun_by, here=here)

    # --- its position -------------------------------------------------------------------------------------------

    def _entered(self, request: Request, fit: _Fit, call: Call) -> Position:
        if fit.track is not None and fit.track.trajectory.strayed():
            fit.track.doubtful = True
            self.strayed = self.strayed or f"step {fit.track.number} (time {(request.time or (0.0,))[0]:g})"
        if request.number < 0 or fit.step:
            if self._learned_from(request):
                fit = self._fit(request, call) or fit
            request.begin_step(call.time, fit.step)
        certain = self._certain(request, fit)
        if request.moves > 1 and request.handle is None:
            self.direction = request.direction
        request.calls[-1] += 1
        track = fit.track
        if track is None:
            track = Track(call.owner, call.form, scope.current_stream(), call.marks, fit.begun_by)
            request.tracks.append(track)
            del request.tracks[:-_MOST_TRACKS]
        track.marks, track.number = call.marks, request.number
        track.thread, track.doubtful = scope.thread_number(), False
        track.trajectory.note(call.picture, fit.moved)
        time = call.time[0] if call.time is not None else float(request.number)
        return Position(request, track, request.number, time, certain)

    def _certain(self, request: Request, fit: _Fit) -> bool:
        """Whether the caches of the track are surely those of the call's stream."""
        if fit.track is None or fit.track.doubtful or fit.answer is Answer.OTHER:
            return False
        if request.handle is not None or fit.track.name is not None:
            return True
        if request.moves == 1 and fit.answer is not Answer.GOES_ON and request.direction * self.direction <= 0:
            return False
        if not fit.by_order:
            return True
        # Several calls at the first timestep are several streams, or trial calls before the real one. And where there
        # are more or fewer of them than before, the first need not be the one that it was.
        *before, last, _ = request.calls
        return last == 1 if request.number == 1 else last == before[-1]

    def _learned_from(self, request: Request) -> bool:
        """Before a step begins: whether the last one shows that an argument varies.

        Then each step has one call, and that call began a track.
        """
        found: set[str] = set()
        for track in request.tracks:
            if track.number == request.number and set(request.calls) == {1}:
                found |= track.begun_by
            track.begun_by = frozenset()
        self.varying |= found
        return bool(found)

    def interrupted(self, position: Position) -> None:
        """The call at `position` raised: it is not counted, as it may be repeated."""
        with self.lock:
            position.track.number = position.number - 1
            position.track.doubtful = True
            position.request.calls[-1] -= 1


def _likeness(fit: _Fit) -> tuple[bool, int, bool, int]:
    """Of the tracks that a call may belong to, the likeliest: at a new step, one that was called at the last."""
    assert fit.track is not None
    return fit.answer is Answer.GOES_ON, fit.same, fit.here, fit.track.number if fit.step else 0
