"""Calls of many requests in any order, against an oracle that knows whose values each cache holds.

Requests start, step, and are cancelled in threads that change; some have handles, guidance in an interval or joined
passes, slots that take a new picture; validation calls, warm-ups, errors and dropped shapes come in between. No call
may read a value that another stream than its own has stored.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor

from moeca_compile.runtime.scope import Generation, generation
from tests.runtime.calls import Made, enter, make_streams

WORKERS = [ThreadPoolExecutor(1) for _ in range(3)]
LABELS = [torch.tensor([label, label]) for label in (3, 4)]
NULL = torch.tensor([10, 10])


def noise(number: int) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))


@dataclass
class Sampling:
    """One request as its user sees it."""

    pictures: list[int]
    """The seed of each slot's picture."""
    label: Tensor
    steps: int
    guided: range
    joined: bool
    unconditional_first: bool
    handle: Generation | None
    worker: int
    number: int = 0

    def x(self) -> Tensor:
        time, slots = self.time, []
        for i, picture in enumerate(self.pictures):
            slots.append((1 - time) * noise(picture + 1)[i] + time * noise(picture)[i])
        return torch.stack(slots)

    @property
    def time(self) -> float:
        return 1 - self.number / self.steps


class Interleavings(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.single = make_streams(full_every=3, recipe="moeca-forecast", max_generations=6)
        self.double = make_streams(self.single, full_every=3, recipe="moeca-forecast", max_generations=6)
        self.running: list[Sampling] = []
        self.seeds = count(0, 2)
        self.stored: dict[int, tuple[Any, list[list[Any]]]] = {}
        """By stream: the object itself, and for each part whose values its slots hold, the newest first."""
        self.reads = 0

    # --- the oracle ---------------------------------------------------------------------------------------------

    def call(self, streams, owner: Any, *time: float, worker: int = 0, handle=None, fails=False, **brought) -> Made:
        def run() -> Made:
            with handle if handle is not None else nullcontext():
                return enter(streams, *time, **brought)

        made = WORKERS[worker].submit(run).result()
        _, known = self.stored.setdefault(id(made.stream), (made.stream, [[], []]))
        for part, fresh in enumerate((made.refresh.attention, made.refresh.experts)):
            del known[part][len(made.stream.full_at[part]) :]
            if not fresh:
                self.reads += 1
                assert known[part], "nothing was stored"
            # A full step keeps the older values for the forecasts after it.
            assert all(other == owner for other in known[part]), f"{owner} has the caches of {known[part]}"
            if fresh and not fails:
                known[part].insert(0, owner)
        if fails:
            streams.requests.interrupted(made.position)
        else:
            made.stream.note_refreshed(made.refresh, made.number, made.time)
            for part in range(2):
                del known[part][len(made.stream.full_at[part]) :]
            streams.finished(made.position)
        return made

    # --- what users do ------------------------------------------------------------------------------------------

    @rule(
        label=st.sampled_from(LABELS),
        steps=st.sampled_from([4, 10, 25]),
        start=st.integers(0, 4),
        length=st.integers(0, 25),
        joined=st.booleans(),
        first=st.booleans(),
        marked=st.booleans(),
        worker=st.integers(0, 2),
    )
    def begin(self, label, steps, start, length, joined, first, marked, worker):
        picture = next(self.seeds)
        handle = generation(object(), steps=steps) if marked else None
        guided = range(start, start + length)
        self.running.append(Sampling([picture] * 2, label, steps, guided, joined, first, handle, worker))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), moves=st.booleans(), steps=st.integers(1, 6), fails=st.booleans())
    def go_on(self, data, moves, steps, fails):
        sampling = data.draw(st.sampled_from(self.running))
        for _ in range(steps):
            self.step(sampling, fails and data.draw(st.booleans()))
            if moves:
                sampling.worker = data.draw(st.integers(0, 2))
            if sampling.number == sampling.steps:
                self.running.remove(sampling)
                break

    def step(self, sampling: Sampling, fails: bool) -> None:
        x, time, owner = sampling.x(), sampling.time, tuple(sampling.pictures)
        made = {"worker": sampling.worker, "handle": sampling.handle}
        if sampling.joined and sampling.number in sampling.guided:
            labels = torch.cat([sampling.label, NULL])
            self.call(self.double, (owner, "joined"), *[time] * 4, x=torch.cat([x, x]), y=labels, **made)
        else:
            passes = [("cond", sampling.label.clone())]
            if sampling.number in sampling.guided and not sampling.joined:
                passes.insert(0 if sampling.unconditional_first else 1, ("uncond", NULL.clone()))
            for name, label in passes:
                if fails:
                    self.call(self.single, (owner, name), time, time, x=x, y=label, fails=True, **made)
                self.call(self.single, (owner, name), time, time, x=x, y=label, **made)
        sampling.number += 1

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def cancel(self, data):
        self.running.remove(data.draw(st.sampled_from(self.running)))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), slot=st.integers(0, 1))
    def take_a_new_picture(self, data, slot):
        """In one slot, at the time that the batch has reached."""
        data.draw(st.sampled_from(self.running)).pictures[slot] = next(self.seeds)

    @rule(
        times=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=8),
        label=st.sampled_from(LABELS),
        worker=st.integers(0, 2),
    )
    def validate(self, times, label, worker):
        for time in times:
            picture = next(self.seeds)
            self.call(self.single, (picture, "single"), time, time, x=noise(picture), y=label, worker=worker)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), time=st.sampled_from([0.0, 0.5, 1.0]), worker=st.integers(0, 2))
    def warm_up(self, data, time, worker):
        """With the labels of a request that is under way, and another picture."""
        label, picture = data.draw(st.sampled_from(self.running)).label, next(self.seeds)
        self.call(self.single, (picture, "single"), time, time, x=noise(picture), y=label, worker=worker)

    @rule(double=st.booleans())
    def drop_a_shape(self, double):
        (self.double if double else self.single).drop()

    @rule()
    def reset(self):
        self.single.requests.reset()

    @invariant()
    def caches_are_bounded(self):
        assert self.single.bounds.count <= 6


def interleave(examples: int) -> None:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    run_state_machine_as_test(seed(0)(Interleavings), settings=chosen)


def test_no_call_reads_what_another_stream_has_stored():
    interleave(100)


@pytest.mark.slow
def test_nor_in_ten_thousand_interleavings():
    interleave(10_000)


def test_the_oracle_finds_a_request_that_is_taken_for_another(monkeypatch):
    """Without a look at the pictures, as they were told before."""
    from moeca_compile.runtime.continuation import Answer, Trajectory

    monkeypatch.setattr(Trajectory, "look", lambda self, given: (Answer.GOES_ON, ()))
    with pytest.raises(AssertionError, match="has the caches of"):
        interleave(100)


def test_undisturbed_requests_are_cached():
    """The machine would find nothing if all steps were full."""
    machine = Interleavings()
    sampling = Sampling([0, 0], LABELS[0], 10, range(3, 7), False, True, None, 0)
    for _ in range(10):
        machine.step(sampling, fails=False)
    assert machine.reads == 2 * (6 + 2)
