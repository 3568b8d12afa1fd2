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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moeca_compile.runtime import scope
from moeca_compile.runtime.arguments import compare
from moeca_compile.runtime.continuation import Answer, Moves
from moeca_compile.runtime.scope import Generation
from moeca_compile.runtime.tracks import Call, Position, Request, Track

_MOST_TRACKS = 64
"""Calls that always come at one timestep look like streams of one step: so many are told apart."""
_MOST_MARKED = 256
"""So many requests with a handle are kept: their ends are known, if users close or drop their handles."""
_REMEMBERED = 4
"""So many requests that gave up their caches for a later one are remembered, to notice if they go on."""
_AS_FAR = 1.1
"""A picture that moves by this much more than the least is as near: of equal ones, the order of calls tells."""


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

    @property
    def far(self) -> float:
        """How far its picture moves, as far as that is known."""
        return max(self.moved, default=0.0)


class Requests:
    """The requests of one model that are under way.

    Args:
        most: how many unmarked requests are kept. A server may sample each in a thread of its own, without an end
            that could be seen, and each call is compared with all of them.
        usual: how many steps the options were made for; None where they do not say.
    """

    def __init__(self, most: int, usual: int | None = None) -> None:
        self.most, self.usual = most, usual
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
        self.lengths: tuple[int, ...] = ()
        """How many steps the last two requests had that have ended. The next is expected to have the fewer of them:
        plans for more steps have their full steps later."""
        self.strayed = ""
        """The first call that turned out, too late, to have read another picture's caches."""
        self.lock = threading.RLock()
        scope.at_end(self)

    @property
    def expected(self) -> int | None:
        """How many steps the next request is expected to have, unless its handle says so."""
        return min(self.lengths, default=self.usual)

    def unusual(self, request: Request) -> int | None:
        """How many steps a request surely has, or those before it had, where that is not the usual number."""
        if self.usual is None:
            return None
        if request.number >= self.usual:
            return request.number + 1
        known = request.steps or (self.lengths[0] if len(self.lengths) > 1 and len(set(self.lengths)) == 1 else None)
        return known if known != self.usual else None

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
        return next(known, None) or self._added(Request(weakref.ref(handle), handle.steps or self.expected))

    def _latest_first(self) -> list[Request]:
        """A copy: Python may collect a handle, and so end its request, in the middle of a walk."""
        return list(self.live.values())[::-1]

    def _added(self, request: Request) -> Request:
        self.live[id(request)] = request
        most = self.most if request.handle is None else _MOST_MARKED
        if len(self.live) > most:
            alike = [other for other in self.live.values() if (other.handle is None) == (request.handle is None)]
            if len(alike) > most:
                self.end(alike[0])
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
        if not fits:
            return None
        most = max(fit.rank for _, fit in fits)
        best = [found for found in fits if found[1].rank == most]
        return best[_nearest([fit for _, fit in best])]

    def _new(self, call: Call) -> tuple[Request, _Fit]:
        """A new request. It takes the place of this thread's last one."""
        thread = scope.thread_number()
        own = (r for r in self._latest_first() if r.handle is None and r.tracks[-1].thread == thread)
        last = next(own, None)
        if last is not None:
            self.short = self.short + 1 if last.number <= 1 else 0
            if not self.interleaved:
                self.end(last)
                self.remembered.append(last)
        return self._added(Request(expected=self.expected)), _Fit(1.0)

    def end(self, request: Request) -> None:
        """Drop a request; its caches go back to their owners."""
        self.live.pop(id(request), None)
        if request.number > 1:  # single calls and pairs are no generations
            self.lengths = (*self.lengths[-1:], request.number + 1)
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
        alike = [(track, same) for track, same, other in told if name is not None or not other]
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
            likeliest = [fit for fit in fits if _likeness(fit) == most]
            return likeliest[_nearest(likeliest)]
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


def _nearest(fits: Sequence[_Fit]) -> int:
    """Which picture moves the least. At the end pictures may have so much in common that another one goes on too."""
    if len(fits) == 1:
        return 0
    least = min(fit.far for fit in fits)
    return next(i for i, fit in enumerate(fits) if fit.far <= _AS_FAR * least)
