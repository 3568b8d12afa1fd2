"""Requests, steps and streams told apart by what calls bring, and their caches kept apart."""

from __future__ import annotations

import contextvars
import math
from dataclasses import replace

import pytest
import torch

from moeca_compile.notes import Notes
from moeca_compile.policies.forecast import FORECASTERS
from moeca_compile.runtime import continuation
from moeca_compile.runtime.schedule import RefreshPlan
from moeca_compile.runtime.scope import generation, stream
from moeca_compile.runtime.streams import Streams
from tests.runtime.calls import (
    COND,
    EVERYTHING,
    NOTHING,
    UNCOND,
    Made,
    call,
    enter,
    in_thread,
    in_thread_of,
    make_streams,
    numbers,
    picture,
    streams,
)

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("times", [(1.0, 0.75, 0.5, 0.25), (0.0, 0.25, 0.5, 0.75), (999.0, 998.5, 997.0, 990.0)])
def test_going_on_in_one_direction_are_steps(times):
    model = make_streams()
    positions = [call(model, t) for t in times]
    assert numbers(positions) == [0, 1, 2, 3]
    assert streams(positions) == [0, 0, 0, 0]
    assert [position.time for position in positions] == list(times)


def test_equal_timesteps_are_model_one_step():
    model = make_streams()
    positions = [call(model, t) for t in (1.0, 1.0, 0.5, 0.5, 0.2, 0.2)]
    assert numbers(positions) == [0, 0, 1, 1, 2, 2]
    assert streams(positions) == [0, 1, 0, 1, 0, 1]


def test_jumping_back_is_a_new_generation():
    model = make_streams()
    positions = [call(model, t) for t in (1.0, 0.5, 0.1, 1.0, 0.5, 0.1, 0.8, 0.4)]
    assert numbers(positions) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(model.requests.live) == 1


def test_a_second_generation_stands_on_zeros_and_leaves_the_first_ones_tensors_alone():
    model = make_streams()
    first = call(model, 1.0)
    first.stream.state["a"].fill_(7)
    call(model, 0.5)
    again = enter(model, 1.0)
    assert again.stream is not first.stream
    assert not again.stream.state["a"].any()
    assert first.stream.state["a"].eq(7).all()  # whoever still holds it keeps it
    assert again.refresh == RefreshPlan(True, True)


def test_caches_are_as_specified_and_zero():
    model = make_streams()
    state = call(model, 1.0).stream.state
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "a": ((2, 3), torch.float32),
        "b": ((4,), torch.int32),
    }
    assert not any(tensor.any() for tensor in state.values())
    assert model.nbytes == 2 * 3 * 4 + 4 * 4


def test_a_stream_that_comes_later_begins_with_a_full_step():
    """Guidance that sets in at the third step."""
    model = make_streams(full_every=4)
    for t in (1.0, 0.9):
        call(model, t)
    conditional = enter(model, 0.8)
    assert conditional.refresh == RefreshPlan(False, False)
    unconditional = enter(model, 0.8)
    assert unconditional.stream is not conditional.stream
    assert unconditional.refresh == RefreshPlan(True, True)
    assert unconditional.number == 2


def test_timesteps_of_a_batch():
    model = make_streams()
    positions = [call(model, *t) for t in ((1.0, 1.0), (1.0, 1.0), (0.5, 0.5), (0.5, 0.4), (1.0, 1.0))]
    assert numbers(positions) == [0, 0, 1, 2, 0]


def test_an_explicit_generation_has_caches_of_its_own():
    model = make_streams()
    outside = call(model, 1.0)
    with generation():
        inside = [call(model, t) for t in (1.0, 0.5)]
    assert numbers(inside) == [0, 1]
    assert inside[0].stream is inside[1].stream is not outside.stream
    after = call(model, 0.5)
    assert after.stream is outside.stream
    assert after.number == 1


def test_two_explicit_generations_may_interleave():
    model = make_streams()
    contexts = [generation(), generation()]
    positions: list[list[Made]] = [[], []]
    # contexts of one thread nest; those of two tasks do not, each task has its own

    tasks = [contextvars.copy_context() for _ in contexts]
    for task, context in zip(tasks, contexts, strict=True):
        task.run(context.__enter__)
    for t in (1.0, 0.9, 0.8):
        for task, found in zip(tasks, positions, strict=True):
            found.append(task.run(call, model, t))
    assert [numbers(found) for found in positions] == [[0, 1, 2], [0, 1, 2]]
    assert positions[0][0].stream is not positions[1][0].stream
    for task, context in zip(tasks, contexts, strict=True):
        task.run(context.__exit__, None, None, None)


def test_inside_an_explicit_generation_time_may_go_back():
    model = make_streams()
    with generation():
        positions = [call(model, t) for t in (1.0, 0.8, 0.9, 0.7)]
    assert numbers(positions) == [0, 1, 2, 3]
    assert streams(positions) == [0, 0, 0, 0]


def test_the_state_of_an_ended_context_is_dropped():
    model = make_streams()
    with generation():
        call(model, 1.0)
    assert model.nbytes == 0
    call(model, 1.0)
    assert len(model.requests.live) == 1


def test_named_streams_may_come_in_any_order():
    model = make_streams()
    found: dict[str, list[Made]] = {"cond": [], "uncond": []}
    for t, order in ((1.0, ("cond", "uncond")), (0.5, ("uncond", "cond")), (0.2, ("cond", "uncond"))):
        for name in order:
            with stream(name):
                found[name].append(call(model, t))
    assert [numbers(positions) for positions in found.values()] == [[0, 1, 2], [0, 1, 2]]
    assert all(streams(positions) == [0, 0, 0] for positions in found.values())
    assert found["cond"][0].stream is not found["uncond"][0].stream


def test_a_request_may_change_its_thread():
    model = make_streams()
    first = call(model, 1.0)
    assert in_thread(call, model, 0.9).stream is first.stream
    assert call(model, 0.8).number == 2


def test_requests_in_threads_do_not_share():
    model = make_streams()
    here = call(model, 1.0)
    there = in_thread(call, model, 0.9, x=picture(1))
    assert there.number == 0 and there.stream is not here.stream
    assert call(model, 0.8).stream is here.stream


def test_inference_mode_and_no_grad_do_not_share():
    model = make_streams()
    outside = call(model, 1.0)
    with torch.inference_mode():
        inside = call(model, 0.5)
        assert inside.stream.state["a"].is_inference()
    assert inside.stream is not outside.stream
    assert inside.refresh == EVERYTHING
    assert not call(model, 0.4).stream.state["a"].is_inference()


def test_the_caches_used_the_longest_ago_are_dropped():
    model = make_streams(max_generations=2)
    first = call(model, 1.0)
    contexts = [generation(), generation()]
    with contexts[0]:
        call(model, 1.0)
        assert len(model.tracks()) == 2
        with contexts[1]:
            call(model, 1.0)
            assert len(model.tracks()) == 2  # the unmarked one went
        call(model, 0.5)
    again = call(model, 0.5)
    assert again.refresh == EVERYTHING
    assert again.stream is not first.stream


def test_streams_are_bounded_too():
    """Calls that always come at one timestep are streams of one step; their caches must not pile up."""
    model = make_streams(max_generations=3)
    for _ in range(10):
        call(model, 1.0)
    assert model.nbytes == 3 * 40
    assert call(model, 0.5).number == 1


def test_reset_drops_everything():
    model = make_streams()
    call(model, 1.0)
    model.requests.reset()
    model.drop()
    assert model.nbytes == 0
    again = call(model, 0.5)
    assert again.number == 0


def test_without_a_timestep_every_call_is_a_step():
    model = make_streams()
    with generation():
        positions = [call(model) for _ in range(3)]
    assert numbers(positions) == [0, 1, 2]
    assert streams(positions) == [0, 0, 0]
    assert [position.time for position in positions] == [0.0, 1.0, 2.0]


# The weights of a forecast: a row for each history, a column for each slot; slots are filled in turn.


def test_the_weights_at_even_and_uneven_timesteps():
    stream_ = enter(make_streams(), 1.0).stream
    both, attention = RefreshPlan(True, True), RefreshPlan(True, False)
    stream_.note_refreshed(both, 0, 1.0)
    assert stream_.weights(1, 0.9) == [[[1.0, 0.0]] * 2] * 2  # one full step: nothing to extrapolate from yet
    stream_.note_refreshed(both, 4, 0.6)
    for time, ahead in ((0.5, 0.25), (0.1, 1.25)):
        assert stream_.weights(5, time) == [[[0.0, 1.0], pytest.approx([-ahead, 1 + ahead])]] * 2
    stream_.note_refreshed(attention, 6, 0.4)  # in the slot of the first
    assert stream_.weights(7, 0.3) == [
        [[1.0, 0.0], pytest.approx([1.5, -0.5])],
        [[0.0, 1.0], pytest.approx([-0.75, 1.75])],
    ]


def test_two_full_steps_at_one_time_give_no_line():
    stream_ = enter(make_streams(), 1.0).stream
    for number in range(2):
        stream_.note_refreshed(RefreshPlan(True, True), number, 1.0)
    assert stream_.weights(2, 0.9) == [[[0.0, 1.0]] * 2] * 2


@pytest.mark.parametrize("forecaster", [name for name in FORECASTERS if name != "chebyshev"])
def test_weights_sum_to_one_whatever_the_history_and_the_rule(forecaster):
    options = {"recipe": "stack-forecast", "forecaster": forecaster, "forecast_order": 2}
    stream_ = enter(make_streams(**options), 1.0).stream
    for number, time in enumerate((1.0, 0.7, 0.5, 0.1)):
        stream_.note_refreshed(RefreshPlan(True, True), number, time)
        (rows, _), known = stream_.weights(11, 0.0), min(number + 1, 3)
        assert [sum(row) for row in rows] == pytest.approx([1.0] * 3)
        assert [sum(weight != 0 for weight in row) for row in rows] == [min(h + 1, known) for h in range(3)]
        assert rows[0][number % 3] == 1.0


def test_what_was_never_computed_is_due():
    model = make_streams()
    made = enter(model, 1.0)
    position, found = replace(made.position, number=1, certain=True), made.stream
    assert model.refresh_plan(position, found) == EVERYTHING
    found.note_refreshed(RefreshPlan(True, False), 0, 1.0)
    assert model.refresh_plan(position, found) == RefreshPlan(False, True)
    found.note_refreshed(RefreshPlan(False, True), 0, 1.0)
    assert model.refresh_plan(position, found) == NOTHING


def test_a_stream_makes_up_for_a_full_step_that_it_missed():
    model = make_streams(full_every=4)
    kinds = []
    for number in range(8):
        with stream("cond"):
            call(model, 1 - number / 10)
        if number not in (4, 5):
            with stream("uncond"):
                kinds.append((number, call(model, 1 - number / 10).refresh.attention))
    assert [number for number, fresh in kinds if fresh] == [0, 6]


def test_a_call_tried_before_the_loop_does_not_leave_its_caches_to_it():
    model = make_streams()
    call(model, 1.0)  # a warm-up with other inputs
    call(model, 1.0)  # the loop's first call looks like a second stream
    assert enter(model, 0.9).refresh == RefreshPlan(True, True)


def test_a_jump_far_ahead_is_another_generation():
    model = make_streams()
    for time in (1.0, 0.98, 0.96):
        call(model, time)
    assert call(model, 0.2).number == 0


def test_an_interrupted_call_leaves_nothing_to_stand_on():
    model = make_streams()
    call(model, 1.0)
    broken = enter(model, 0.9)
    model.requests.interrupted(broken.position)
    again = enter(model, 0.9)
    assert again.stream is broken.stream and again.stream.empty
    assert again.refresh == EVERYTHING and again.number == 1


@pytest.mark.parametrize(("room", "crowded"), [(1, True), (2, False)])
def test_streams_that_drop_each_other_are_noticed(room, crowded):
    model = make_streams(max_generations=room)
    fresh = []
    for t in (1.0, 1.0, 0.5, 0.5):
        position = enter(model, t)
        fresh.append(position.refresh == RefreshPlan(True, True))
        position.stream.note_refreshed(RefreshPlan(True, True), position.number, position.time)
    assert model.crowded is crowded
    assert all(fresh)  # after two calls at the first timestep, the second is full either way


def test_a_later_generation_may_take_the_room_of_an_earlier_one():
    model = make_streams(max_generations=1)
    for t in (1.0, 0.5, 0.1, 1.0, 0.5):
        call(model, t)
    assert not model.crowded


# --- told by what calls bring -------------------------------------------------------------------------------------


def test_labels_tell_streams_apart_in_any_order():
    """Also where each step has labels made anew; and none is full but the first."""
    model = make_streams(full_every=9)
    order = [UNCOND, COND, COND, UNCOND] * 2
    made = [call(model, 1 - n // 2 / 10, y=y.clone()) for n, y in enumerate(order)]
    cond, uncond = [made[1], made[2], made[5], made[6]], [made[0], made[3], made[4], made[7]]
    for stream_ in (cond, uncond):
        assert numbers(stream_) == [0, 1, 2, 3]
        assert len({id(each.stream) for each in stream_}) == 1
        assert [each.refresh for each in stream_] == [EVERYTHING, NOTHING, NOTHING, NOTHING]


def test_guidance_within_an_interval_unconditional_first():
    model, made = make_streams(full_every=20), {"cond": [], "uncond": []}
    for n in range(10):
        if 3 <= n <= 6:
            made["uncond"].append(call(model, 1 - n / 10, y=UNCOND))
        made["cond"].append(call(model, 1 - n / 10, y=COND))
    assert numbers(made["cond"]) == list(range(10)) and numbers(made["uncond"]) == [3, 4, 5, 6]
    assert {id(m.stream) for m in made["cond"]}.isdisjoint({id(m.stream) for m in made["uncond"]})
    assert [m.refresh for m in made["uncond"]] == [EVERYTHING, NOTHING, NOTHING, NOTHING]
    assert all(m.refresh == NOTHING for m in made["cond"][1:])


def test_guidance_within_an_interval_joined():
    """B, 2B, B: the steps at 2B count, so that the caches of B are not read when they are older than allowed."""
    one = make_streams(full_every=4)
    two, both = make_streams(one), torch.cat([COND, UNCOND])
    ages = []
    for n in range(12):
        x = picture(moved=n / 100)
        if 2 <= n <= 7:
            made = call(two, *[1 - n / 12] * 4, x=torch.cat([x, x]), y=both)
        else:
            made = call(one, *[1 - n / 12] * 2, x=x, y=COND)
            ages.append(n - made.stream.last_full[0])
        assert made.number == n
    assert max(ages) < 4


def test_the_number_of_steps_is_that_of_the_mark_or_else_of_the_last_generations():
    model = make_streams(schedule="power", full_every=3)
    expected = []
    for length in (6, 9, 9, 9):
        for number in range(length):
            expected.append(call(model, 1 - number / length).position.request.expected)
    assert expected == [None] * 6 + [6] * 9 + [6] * 9 + [9] * 9
    with generation(object(), steps=12):
        assert call(model, 1.0).position.request.expected == 12


def test_single_calls_say_nothing_of_the_number_of_steps():
    model = make_streams(schedule="power", full_every=3)
    for time in (0.3, 0.9, 0.1, 0.7):
        assert call(model, time, x=picture(int(10 * time))).position.request.expected is None


def test_a_cancelled_request_and_the_next_one_in_two_threads():
    model = make_streams()
    workers = [in_thread_of() for _ in range(2)]
    for t in (1.0, 0.9):
        workers[0](call, model, t, x=picture(1, moved=1 - t), y=COND)
    made = [workers[n % 2](call, model, 1 - n / 10, x=picture(2, moved=n / 100), y=COND) for n in range(4)]
    assert numbers(made) == [0, 1, 2, 3]
    assert made[0].refresh == EVERYTHING and made[0].stream.empty is False
    assert len({id(each.stream) for each in made}) == 1


def test_equal_requests_in_threads_have_caches_of_their_own():
    """As in a load test: the same picture and labels, out of step."""
    model = make_streams(full_every=4)
    workers, made = [in_thread_of() for _ in range(3)], ([], [], [])
    for turn in range(10):
        for late, worker in enumerate(workers):
            if (n := turn - late) >= 0:
                made[late].append(worker(call, model, 1 - n / 10, x=picture(moved=n / 100), y=COND))
    for found in made:
        assert numbers(found) == list(range(len(found)))
        assert [m.refresh == EVERYTHING for m in found] == [n % 4 == 0 for n in range(len(found))]
    assert len({id(found[-1].stream) for found in made}) == 3


def test_requests_in_ever_new_threads_do_not_pile_up():
    model = make_streams(max_generations=2)
    for seed in range(300):
        in_thread(call, model, 1.0, x=picture(seed))
    assert len(model.requests.live) == 8 and model.nbytes == 2 * model.stream_bytes


def test_two_requests_that_take_turns_without_marks():
    """The second takes the first one's place until that goes on."""
    model, made = make_streams(full_every=9), ([], [])
    for n in range(6):
        for seed in (0, 1):
            made[seed].append(call(model, 1 - n / 10, x=picture(seed, moved=n / 100), y=COND))
    for of_one in made:
        assert [m.refresh for m in of_one[2:]] == [NOTHING] * 4
    assert made[0][-1].stream is not made[1][-1].stream


@pytest.mark.parametrize("then", [(0.4, 1.0), (1.0, 1.0)])
def test_a_slot_that_takes_a_new_picture(then):
    model = make_streams()
    for time in ((0.7, 0.3), (0.5, 0.1)):
        call(model, *time)
    x = picture(moved=0.01)
    x[1] = picture(5)[1]
    made = call(model, *then, x=x)
    assert made.refresh == EVERYTHING and made.stream.state.filled == [1, 1]


def test_a_slot_that_takes_a_new_picture_at_the_time_that_follows():
    """Nothing but its content tells."""
    model = make_streams()
    for time in (0.7, 0.6):
        call(model, time, time)
    x = picture(moved=0.01)
    x[1] = picture(5)[1]
    assert call(model, 0.5, 0.5, x=x).refresh == EVERYTHING


def test_a_slot_that_stands_still_hides_no_new_generation():
    """A clean reference picture at time 0 beside one that is sampled."""
    model, made = make_streams(full_every=9), []
    for seed in range(3):
        for n in range(4):
            x = torch.cat([picture(9, samples=1), picture(seed, moved=n / 100, samples=1)])
            made.append(call(model, 0.0, 1 - n / 4, x=x))
    assert numbers(made) == [0, 1, 2, 3] * 3
    assert [m.refresh == EVERYTHING for m in made] == [True, False, False, False] * 3


def test_validation_calls_after_sampling_and_the_next_picture():
    model = make_streams()
    for n in range(8):
        call(model, 1 - n / 8)
    times = torch.rand(32, generator=torch.Generator().manual_seed(0)).tolist()
    for seed, time in enumerate(times):
        assert call(model, time, x=picture(100 + seed)).refresh == EVERYTHING
    made = [call(model, 1 - n / 8, x=picture(7, moved=n / 100)) for n in range(4)]
    assert made[0].refresh == EVERYTHING and made[0].stream.full_at == [[1.0], [1.0]]


@pytest.mark.parametrize("same_picture", [False, True])
@pytest.mark.parametrize("time", [0.5, 1.0, 0.02])
def test_a_warm_up_call_before_the_loop(same_picture, time):
    """Nothing that it left is read, and no forecast extrapolates from it."""
    model = make_streams(full_every=4, recipe="moeca-forecast")
    call(model, time, x=picture(0 if same_picture else 5))
    made = [call(model, 1 - n / 10, x=picture(0, moved=n / 100)) for n in range(5)]
    assert made[0].refresh == EVERYTHING
    full = [m.time for m in made if m.refresh == EVERYTHING]
    assert set(made[-1].stream.full_at[0]) <= {1.0, *full}
    assert numbers(made[2:]) == [made[2].number, made[2].number + 1, made[2].number + 2]
    assert made[-2].refresh == NOTHING


def test_a_request_cancelled_after_one_step_leaves_no_history():
    model = make_streams(full_every=4, recipe="moeca-forecast")
    call(model, 1.0, x=picture(3))
    made = [call(model, 1 - n / 10, x=picture(4, moved=n / 100)) for n in range(3)]
    assert [m.stream.state.filled for m in made] == [[1, 1]] * 3
    assert [m.refresh for m in made] == [EVERYTHING, NOTHING, NOTHING]


def test_streams_may_be_numbered():
    model, found = make_streams(), []
    for name in (1, 0):
        with stream(name):
            found.append(call(model, 1.0).stream)
    assert found[0] is not found[1]


def test_an_argument_that_changes_at_every_step_tells_no_stream():
    """It costs one more full step, once."""
    model = make_streams(full_every=9)
    made = [call(model, 1 - n / 10, y=COND, strength=torch.tensor(float(n))) for n in range(6)]
    assert [m.refresh == EVERYTHING for m in made] == [True, True, False, False, False, False]
    made = [call(model, 1 - n / 10, x=picture(1, n / 100), y=COND, strength=torch.tensor(float(n))) for n in range(3)]
    assert [m.refresh == EVERYTHING for m in made] == [True, False, False]


def straight(t: float) -> tuple[float, float]:
    return 1 - t, t


def variance_preserving(t: float) -> tuple[float, float]:
    return math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)


def test_many_small_pictures_of_a_stochastic_sampler_go_on():
    """50 steps of DDPM on pictures of 64 elements: the correlation of successive ones, 0.8, is measured on few."""
    generator = torch.Generator().manual_seed(0)
    betas = torch.linspace(1e-4, 0.02, 1000)
    x, chain = torch.randn(200, 1, 8, 8, generator=generator), []
    for kept in (1 - betas).log().view(50, 20).sum(1).exp().tolist():
        x = kept**0.5 * x + (1 - kept) ** 0.5 * torch.randn(x.shape, generator=generator)
        chain.append(x)
    model = make_streams(full_every=100)
    made = [call(model, 1 - n / 50, x=x, y=torch.zeros(200)) for n, x in enumerate(reversed(chain))]
    assert [m.refresh == EVERYTHING for m in made] == [True] + [False] * 49
    other = torch.randn(200, 1, 8, 8, generator=generator)
    assert call(model, 0.001, x=other, y=torch.zeros(200)).refresh == EVERYTHING


@pytest.mark.parametrize("path", [straight, variance_preserving])
def test_samplers_of_few_steps_pass_the_check(path):
    """Four steps from noise to a picture that is unlike it."""
    model, clean, noise = make_streams(full_every=9), picture(1), picture(0)
    made = [call(model, t, x=path(t)[0] * clean + path(t)[1] * noise) for t in (1.0, 0.75, 0.5, 0.25)]
    assert [m.refresh == EVERYTHING for m in made] == [True, False, False, False]


def test_where_the_host_cannot_wait_the_step_after_is_full_and_a_warning_says_which_call(monkeypatch):
    """As on an accelerator, where equal requests take turns unmarked."""
    monkeypatch.setattr(continuation, "answers_at_once", lambda device: False)
    model, notes = make_streams(full_every=9), Notes()
    for n in range(4):
        call(model, 1 - n / 10, x=picture(0, moved=n / 100))
    stray = call(model, 0.6, x=picture(1))
    assert stray.refresh == NOTHING  # nobody can know yet
    after = call(model, 0.5, x=picture(1, moved=0.01))
    assert after.refresh == EVERYTHING and after.stream.state.filled == [1, 1]
    with pytest.warns(UserWarning, match=r"step 4 \(time 0.6\) read the caches of another picture"):
        model.warn_if_caches_unused(notes)
    assert call(model, 0.4, x=picture(1, moved=0.02)).refresh == NOTHING


# --- bounds over the model ----------------------------------------------------------------------------------------


def test_shapes_share_the_bounds_of_the_model():
    first = make_streams(max_generations=3)
    several = [first, *(make_streams(first) for _ in range(7))]
    handles = [generation(object()) for _ in several]
    for handle, each in zip(handles, several, strict=True):
        with handle:
            call(each, 1.0)
    assert sum(each.nbytes for each in several) == 3 * first.stream_bytes


# --- memory that goes from stream to stream, for steps that are recorded over it -----------------------------------


def recycling(**options) -> Streams:
    model = make_streams(**options)
    model.recycles = True
    return model


def memory(position: Made) -> int:
    return position.stream.state["a"].data_ptr()


def test_a_new_generation_is_in_the_memory_of_the_last_one():
    model = recycling()
    first = call(model, 1.0)
    first.stream.capacity, first.stream.graphs["kind"] = 16, "recorded"
    call(model, 0.5)
    again = call(model, 1.0)
    assert again.stream is not first.stream and memory(again) == memory(first)
    assert again.stream.capacity == 16 and again.stream.graphs == {"kind": "recorded"}
    assert make_streams().recycles is False
    plain = make_streams()
    before = call(plain, 1.0)
    call(plain, 0.5)
    assert memory(call(plain, 1.0)) != memory(before)


def test_model_ended_generations_are_taken_best_by_their_name():
    model, made = recycling(), {}
    with generation():
        for name in ("cond", "uncond"):
            with stream(name):
                made[name] = call(model, 1.0)
            made[name].stream.capacity = 16
    assert len(model.spare) == 2 and model.nbytes > 0
    with generation():
        with stream("cond"):
            cond = call(model, 1.0)
        with stream("third"):
            third = call(model, 1.0)
        with stream("fourth"):
            fourth = call(model, 1.0)
    assert memory(cond) == memory(made["cond"]) and cond.stream.capacity == 16
    assert memory(third) == memory(made["uncond"]) and third.stream.capacity is None  # it has yet to find its own
    assert memory(fourth) not in (memory(cond), memory(third))


def test_memory_stays_in_its_mode_and_where_it_was_made(monkeypatch):
    model = recycling()
    with generation():
        normal = call(model, 1.0)
    with generation(), torch.inference_mode():
        inference = call(model, 1.0)
    assert memory(inference) != memory(normal)
    monkeypatch.setattr(model, "_allocator", lambda: "another queue of the device")
    with generation():
        assert memory(call(model, 1.0)) not in (memory(inference), memory(normal))


def test_spare_streams_make_room_before_live_ones():
    model = recycling(max_generations=2)
    for _ in range(2):
        with generation():
            with stream("a"):
                call(model, 1.0)
            with stream("b"):
                call(model, 1.0)
    assert len(model.spare) == 2
    with stream("live"):
        call(model, 1.0)
    assert len(model.spare) == 1
    model.requests.reset()
    model.drop()
    assert model.spare == [] and model.nbytes == 0
