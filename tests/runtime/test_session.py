"""Generations, steps and streams told apart, and their caches kept apart."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
import torch
from moeca_compile.runtime.session import Position, Sessions

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part
from moeca_compile.policies import forecast
from moeca_compile.runtime.schedule import RefreshPlan
from moeca_compile.runtime.scope import generation, stream

pytestmark = pytest.mark.smoke

SPECS = [CacheSpec("a", (2, 3), torch.float32), CacheSpec("b", (4,), torch.int32)]


def make_sessions(**options) -> Sessions:
    return Sessions(MoecaConfig(**options), SPECS, {Part.ATTENTION, Part.EXPERTS}, torch.device("cpu"))


def call(sessions: Sessions, *timestep: float) -> Position:
    """A call at a timestep that is then run, as the engine does."""
    position = sessions.enter(timestep or None)
    assert all(position.stream.state[spec.name] is not None for spec in SPECS), "read, and so allocated"
    position.stream.note_refreshed(sessions.refresh_plan(position), position.number, position.time)
    return position


def numbers(positions: list[Position]) -> list[int]:
    return [position.number for position in positions]


def streams(positions: list[Position]) -> list[int]:
    """Streams by the order in which they were first met."""
    known: list[int] = []
    for position in positions:
        if id(position.stream) not in known:
            known.append(id(position.stream))
    return [known.index(id(position.stream)) for position in positions]


@pytest.mark.parametrize("times", [(1.0, 0.75, 0.5, 0.25), (0.0, 0.25, 0.5, 0.75), (999.0, 998.5, 997.0, 990.0)])
def test_going_on_in_one_direction_are_steps(times):
    sessions = make_sessions()
    positions = [call(sessions, t) for t in times]
    assert numbers(positions) == [0, 1, 2, 3]
    assert streams(positions) == [0, 0, 0, 0]
    assert [position.time for position in positions] == list(times)


def test_equal_timesteps_are_streams_of_one_step():
    sessions = make_sessions()
    positions = [call(sessions, t) for t in (1.0, 1.0, 0.5, 0.5, 0.2, 0.2)]
    assert numbers(positions) == [0, 0, 1, 1, 2, 2]
    assert streams(positions) == [0, 1, 0, 1, 0, 1]


def test_jumping_back_is_a_new_generation():
    sessions = make_sessions()
    positions = [call(sessions, t) for t in (1.0, 0.5, 0.1, 1.0, 0.5, 0.1, 0.8, 0.4)]
    assert numbers(positions) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(sessions.generations) == 1


def test_a_second_generation_stands_on_zeros_and_leaves_the_first_ones_tensors_alone():
    sessions = make_sessions()
    first = call(sessions, 1.0)
    first.stream.state["a"].fill_(7)
    call(sessions, 0.5)
    again = sessions.enter((1.0,))
    assert again.stream is not first.stream
    assert not again.stream.state["a"].any()
    assert first.stream.state["a"].eq(7).all()  # whoever still holds it keeps it
    assert sessions.refresh_plan(again) == RefreshPlan(True, True)


def test_caches_are_as_specified_and_zero():
    sessions = make_sessions()
    state = call(sessions, 1.0).stream.state
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "a": ((2, 3), torch.float32),
        "b": ((4,), torch.int32),
    }
    assert not any(tensor.any() for tensor in state.values())
    assert sessions.nbytes == 2 * 3 * 4 + 4 * 4


def test_a_stream_that_comes_later_begins_with_a_full_step():
    """Guidance that sets in at the third step."""
    sessions = make_sessions(full_every=4)
    for t in (1.0, 0.9):
        call(sessions, t)
    conditional = sessions.enter((0.8,))
    assert sessions.refresh_plan(conditional) == RefreshPlan(False, False)
    unconditional = sessions.enter((0.8,))
    assert unconditional.stream is not conditional.stream
    assert sessions.refresh_plan(unconditional) == RefreshPlan(True, True)
    assert unconditional.number == 2


def test_timesteps_of_a_batch():
    sessions = make_sessions()
    positions = [call(sessions, *t) for t in ((1.0, 1.0), (1.0, 1.0), (0.5, 0.5), (0.5, 0.4), (1.0, 1.0))]
    assert numbers(positions) == [0, 0, 1, 2, 0]


def test_an_explicit_generation_has_caches_of_its_own():
    sessions = make_sessions()
    outside = call(sessions, 1.0)
    with generation():
        inside = [call(sessions, t) for t in (1.0, 0.5)]
    assert numbers(inside) == [0, 1]
    assert inside[0].stream is inside[1].stream is not outside.stream
    after = call(sessions, 0.5)
    assert after.stream is outside.stream
    assert after.number == 1


def test_two_explicit_generations_may_interleave():
    sessions = make_sessions()
    contexts = [generation(), generation()]
    positions: list[list[Position]] = [[], []]
    # contexts of one thread nest; those of two tasks do not, each task has its own
    import contextvars

    tasks = [contextvars.copy_context() for _ in contexts]
    for task, context in zip(tasks, contexts, strict=True):
        task.run(context.__enter__)
    for t in (1.0, 0.9, 0.8):
        for task, found in zip(tasks, positions, strict=True):
            found.append(task.run(call, sessions, t))
    assert [numbers(found) for found in positions] == [[0, 1, 2], [0, 1, 2]]
    assert positions[0][0].stream is not positions[1][0].stream
    for task, context in zip(tasks, contexts, strict=True):
        task.run(context.__exit__, None, None, None)


def test_inside_an_explicit_generation_time_may_go_back():
    sessions = make_sessions()
    with generation():
        positions = [call(sessions, t) for t in (1.0, 0.8, 0.9, 0.7)]
    assert numbers(positions) == [0, 1, 2, 3]
    assert streams(positions) == [0, 0, 0, 0]


def test_the_state_of_an_ended_context_is_dropped():
    sessions = make_sessions()
    with generation():
        call(sessions, 1.0)
    assert sessions.nbytes == 0
    call(sessions, 1.0)
    assert len(sessions.generations) == 1


def test_named_streams_may_come_in_any_order():
    sessions = make_sessions()
    found: dict[str, list[Position]] = {"cond": [], "uncond": []}
    for t, order in ((1.0, ("cond", "uncond")), (0.5, ("uncond", "cond")), (0.2, ("cond", "uncond"))):
        for name in order:
            with stream(name):
                found[name].append(call(sessions, t))
    assert [numbers(positions) for positions in found.values()] == [[0, 1, 2], [0, 1, 2]]
    assert all(streams(positions) == [0, 0, 0] for positions in found.values())
    assert found["cond"][0].stream is not found["uncond"][0].stream


def test_threads_do_not_share():
    sessions, found = make_sessions(), []
    here = call(sessions, 1.0)
    thread = threading.Thread(target=lambda: found.append(call(sessions, 0.5)))
    thread.start()
    thread.join()
    assert found[0].number == 0
    assert found[0].stream is not here.stream
    assert call(sessions, 0.5).stream is here.stream


def test_inference_mode_and_no_grad_do_not_share():
    sessions = make_sessions()
    outside = call(sessions, 1.0)
    with torch.inference_mode():
        inside = call(sessions, 0.5)
        assert inside.stream.state["a"].is_inference()
    assert inside.stream is not outside.stream
    assert inside.number == 0
    assert not call(sessions, 0.5).stream.state["a"].is_inference()


def test_the_least_recently_used_state_is_dropped():
    sessions = make_sessions(max_generations=2)
    first = call(sessions, 1.0)
    contexts = [generation(), generation()]
    with contexts[0]:
        call(sessions, 1.0)
        assert len(sessions.generations) == 2
        with contexts[1]:
            call(sessions, 1.0)
            assert len(sessions.generations) == 2  # the thread's own went
        call(sessions, 0.5)
    again = call(sessions, 0.5)
    assert again.number == 0
    assert again.stream is not first.stream


def test_streams_are_bounded_too():
    """Calls that always come at one timestep are streams of one step; their caches must not pile up."""
    sessions = make_sessions(max_generations=3)
    for _ in range(10):
        call(sessions, 1.0)
    assert sessions.nbytes == 3 * 40
    assert call(sessions, 0.5).number == 1


def test_reset_drops_everything():
    sessions = make_sessions()
    call(sessions, 1.0)
    sessions.reset()
    assert sessions.nbytes == 0
    again = call(sessions, 0.5)
    assert again.number == 0


def test_without_a_timestep_every_call_is_a_step():
    sessions = make_sessions()
    with generation():
        positions = [call(sessions) for _ in range(3)]
    assert numbers(positions) == [0, 1, 2]
    assert streams(positions) == [0, 0, 0]
    assert [position.time for position in positions] == [0.0, 1.0, 2.0]


# The weights of a forecast: a row for each history, a column for each slot; slots are filled in turn.


def test_the_weights_at_even_and_uneven_timesteps():
    stream_ = make_sessions().enter((1.0,)).stream
    both, attention = RefreshPlan(True, True), RefreshPlan(True, False)
    stream_.note_refreshed(both, 0, 1.0)
    assert stream_.weights(0.9) == [[[1.0, 0.0]] * 2] * 2  # one full step: nothing to extrapolate from yet
    stream_.note_refreshed(both, 4, 0.6)
    for time, ahead in ((0.5, 0.25), (0.1, 1.25)):
        assert stream_.weights(time) == [[[0.0, 1.0], pytest.approx([-ahead, 1 + ahead])]] * 2
    stream_.note_refreshed(attention, 6, 0.4)  # in the slot of the first
    assert stream_.weights(0.3) == [
        [[1.0, 0.0], pytest.approx([1.5, -0.5])],
        [[0.0, 1.0], pytest.approx([-0.75, 1.75])],
    ]


def test_two_full_steps_at_one_time_give_no_line():
    stream_ = make_sessions().enter((1.0,)).stream
    for number in range(2):
        stream_.note_refreshed(RefreshPlan(True, True), number, 1.0)
    assert stream_.weights(0.9) == [[[0.0, 1.0]] * 2] * 2


def test_weights_sum_to_one_whatever_the_history_and_the_rule(monkeypatch):
    def quadratic(times, time):
        return [math.prod((time - b) / (a - b) for b in times if b != a) for a in times]

    monkeypatch.setattr(forecast, "RULE", forecast.Rule(3, quadratic))
    stream_ = make_sessions().enter((1.0,)).stream
    for number, time in enumerate((1.0, 0.7, 0.5, 0.1)):
        stream_.note_refreshed(RefreshPlan(True, True), number, time)
        (rows, _), known = stream_.weights(0.0), min(number + 1, 3)
        assert [sum(row) for row in rows] == pytest.approx([1.0] * 3)
        assert [sum(weight != 0 for weight in row) for row in rows] == [min(h + 1, known) for h in range(3)]
        assert rows[0][number % 3] == 1.0


def test_what_was_never_computed_is_due():
    sessions = make_sessions()
    position = sessions.enter((1.0,))
    position = replace(position, number=1)
    assert sessions.refresh_plan(position) == RefreshPlan(True, True)
    position.stream.note_refreshed(RefreshPlan(True, False), 0, 1.0)
    assert sessions.refresh_plan(position) == RefreshPlan(False, True)
    position.stream.note_refreshed(RefreshPlan(False, True), 0, 1.0)
    assert sessions.refresh_plan(position) == RefreshPlan(False, False)


def test_a_stream_makes_up_for_a_full_step_that_it_missed():
    sessions = make_sessions(full_every=4)
    kinds = []
    for number in range(8):
        with stream("cond"):
            call(sessions, 1 - number / 10)
        if number not in (4, 5):
            with stream("uncond"):
                position = sessions.enter((1 - number / 10,))
                kinds.append((number, sessions.refresh_plan(position).attention))
                position.stream.note_refreshed(sessions.refresh_plan(position), position.number, position.time)
    assert [number for number, fresh in kinds if fresh] == [0, 6]


def test_a_call_tried_before_the_loop_does_not_leave_its_caches_to_it():
    sessions = make_sessions()
    call(sessions, 1.0)  # a warm-up with other inputs
    call(sessions, 1.0)  # the loop's first call looks like a second stream
    assert sessions.refresh_plan(sessions.enter((0.9,))) == RefreshPlan(True, True)


def test_a_jump_far_ahead_is_another_generation():
    sessions = make_sessions()
    for time in (1.0, 0.98, 0.96):
        call(sessions, time)
    assert call(sessions, 0.2).number == 0


def test_an_interrupted_call_leaves_nothing_to_stand_on():
    sessions = make_sessions()
    call(sessions, 1.0)
    sessions.interrupted(sessions.enter((0.9,)))
    again = sessions.enter((0.9,))
    assert again.stream is next(iter(again.generation.streams.values()))
    assert sessions.refresh_plan(again) == RefreshPlan(True, True)


@pytest.mark.parametrize(("room", "crowded"), [(1, True), (2, False)])
def test_streams_that_drop_each_other_are_noticed(room, crowded):
    sessions = make_sessions(max_generations=room)
    fresh = []
    for t in (1.0, 1.0, 0.5, 0.5):
        position = sessions.enter((t,))
        fresh.append(sessions.refresh_plan(position) == RefreshPlan(True, True))
        position.stream.note_refreshed(RefreshPlan(True, True), position.number, position.time)
    assert sessions.evicting_live_streams is crowded
    assert all(fresh)  # after two calls at the first timestep, the second is full either way


def test_a_later_generation_may_take_the_room_of_an_earlier_one():
    sessions = make_sessions(max_generations=1)
    for t in (1.0, 0.5, 0.1, 1.0, 0.5):
        call(sessions, t)
    assert not sessions.evicting_live_streams


# --- memory that goes from stream to stream, for steps that are recorded over it -----------------------------------


def recycling(**options) -> Sessions:
    sessions = make_sessions(**options)
    sessions.recycles = True
    return sessions


def memory(position: Position) -> int:
    return position.stream.state["a"].data_ptr()


def test_a_new_generation_is_in_the_memory_of_the_last_one():
    sessions = recycling()
    first = call(sessions, 1.0)
    first.stream.capacity, first.stream.graphs["kind"] = 16, "recorded"
    call(sessions, 0.5)
    again = call(sessions, 1.0)
    assert again.stream is not first.stream and memory(again) == memory(first)
    assert again.stream.capacity == 16 and again.stream.graphs == {"kind": "recorded"}
    assert make_sessions().recycles is False
    plain = make_sessions()
    before = call(plain, 1.0)
    call(plain, 0.5)
    assert memory(call(plain, 1.0)) != memory(before)


def test_streams_of_ended_generations_are_taken_best_by_their_name():
    sessions, made = recycling(), {}
    with generation():
        for name in ("cond", "uncond"):
            with stream(name):
                made[name] = call(sessions, 1.0)
            made[name].stream.capacity = 16
    assert len(sessions.spare) == 2 and sessions.nbytes > 0
    with generation():
        with stream("cond"):
            cond = call(sessions, 1.0)
        with stream("third"):
            third = call(sessions, 1.0)
        with stream("fourth"):
            fourth = call(sessions, 1.0)
    assert memory(cond) == memory(made["cond"]) and cond.stream.capacity == 16
    assert memory(third) == memory(made["uncond"]) and third.stream.capacity is None  # it has yet to find its own
    assert memory(fourth) not in (memory(cond), memory(third))


def test_memory_stays_in_its_mode_and_where_it_was_made(monkeypatch):
    sessions = recycling()
    with generation():
        normal = call(sessions, 1.0)
    with generation(), torch.inference_mode():
        inference = call(sessions, 1.0)
    assert memory(inference) != memory(normal)
    monkeypatch.setattr(sessions, "_allocator", lambda: "another queue of the device")
    with generation():
        assert memory(call(sessions, 1.0)) not in (memory(inference), memory(normal))


def test_spare_streams_make_room_before_live_ones():
    sessions = recycling(max_generations=2)
    for _ in range(2):
        with generation():
            with stream("a"):
                call(sessions, 1.0)
            with stream("b"):
                call(sessions, 1.0)
    assert len(sessions.spare) == 2
    with stream("live"):
        call(sessions, 1.0)
    assert len(sessions.spare) == 1
    sessions.reset()
    assert sessions.spare == [] and sessions.nbytes == 0
