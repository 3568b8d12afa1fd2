"""Handles of generations: entered at each step, in any thread, task or context."""

from __future__ import annotations

import contextvars
import gc

import pytest

from moeca_compile.runtime.scope import generation
from tests.runtime.calls import COND, EVERYTHING, UNCOND, Made, call, in_thread, make_streams, numbers, picture

pytestmark = pytest.mark.smoke


def test_a_handle_is_entered_at_each_step_in_any_thread_and_context():
    model, handle = make_streams(full_every=9), generation(object())

    def step(n: int) -> Made:
        with handle:
            return call(model, 1 - n / 10, x=picture(moved=n / 100))

    runs = (step, lambda n: in_thread(step, n), lambda n: contextvars.Context().run(step, n))
    made = [runs[n % 3](n) for n in range(6)]
    assert numbers(made) == list(range(6))
    assert len({id(each.stream) for each in made}) == 1
    handle.close()
    assert model.nbytes == 0


def test_a_handle_ends_with_its_last_step_or_with_whoever_holds_it():
    model = make_streams()
    handle = generation(object(), steps=3)
    for n in range(3):
        with handle:
            for y in (COND, UNCOND):
                call(model, 1 - n / 3, x=picture(moved=n / 100), y=y)
    assert model.nbytes == 0
    handle = generation(object())
    with handle:
        call(model, 1.0)
    assert model.nbytes > 0
    del handle
    gc.collect()
    assert model.nbytes == 0


def test_generators_in_fresh_contexts_may_interleave_and_end_in_any_order():
    """Streaming: each step runs in a context of its own."""
    model = make_streams(full_every=9)

    def steps(seed: int, handle):
        for n in range(4):
            with handle:
                yield call(model, 1 - n / 10, x=picture(seed, moved=n / 100))

    handles = [generation(object()) for _ in range(2)]
    running = [steps(seed, handle) for seed, handle in enumerate(handles)]
    made = [[contextvars.Context().run(next, one) for one in running] for _ in range(4)]
    for found in zip(*made, strict=True):
        assert numbers(list(found)) == [0, 1, 2, 3]
    for one in running:
        contextvars.Context().run(one.close)
    for handle in handles:
        handle.close()
    assert model.nbytes == 0 and call(model, 1.0).number == 0


def test_a_mark_around_a_generator_in_fresh_contexts_neither_raises_nor_stays():
    model = make_streams()

    def steps():
        with generation():
            for n in range(3):
                yield call(model, 1 - n / 10, x=picture(moved=n / 100))

    running = steps()
    found = [contextvars.Context().run(next, running) for _ in range(3)]
    assert len({id(each.stream) for each in found[1:]}) == 1
    contextvars.Context().run(running.close)
    assert call(model, 1.0, x=picture(5)).refresh == EVERYTHING


def test_a_mark_that_does_not_reach_its_calls_is_told_of():
    model = make_streams()
    with pytest.warns(UserWarning, match="none of the 2 calls.*Enter it where the model is called"), generation():
        for n in range(2):
            in_thread(call, model, 1 - n / 10)


def test_an_ended_generation_cannot_be_entered():
    handle = generation()
    with handle:
        pass
    with pytest.raises(RuntimeError, match="has ended"), handle:
        pass
    with pytest.raises(ValueError, match="at least one step"):
        generation(object(), steps=0)
