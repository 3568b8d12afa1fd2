"""Which parts of which steps are computed anew."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeca_compile.config import MoecaConfig
from moeca_compile.options import SCHEDULES, WITH_EXPONENT
from moeca_compile.passes.rewrite.kinds import Part
from moeca_compile.runtime.schedule import CURVED, EVERYTHING, RefreshPlan, Schedule, power_steps, toca_steps
from moeca_compile.tuned_file import Calibrated
from tests.harness import calls_of

SEVERAL, WHOLE = frozenset({Part.ATTENTION, Part.EXPERTS}), frozenset({Part.WHOLE})
"""The parts that moeca caches, and those that stack does."""


def schedule(**options) -> Schedule:
    options = {"recipe": "moeca", **options}
    return Schedule(MoecaConfig(**options), WHOLE if options["recipe"] == "stack" else SEVERAL)


def parts(steps: int, **options) -> tuple[list[int], list[int]]:
    """Steps with fresh attention, and with fresh experts, where every step is called."""
    plan = schedule(**options)
    fresh = [plan.parts_to_refresh(number - 1, number - 1, number) for number in range(steps)]
    return [i for i, f in enumerate(fresh) if f.attention], [i for i, f in enumerate(fresh) if f.experts]


@pytest.mark.parametrize(
    ("options", "attention", "experts"),
    [
        ({"full_every": 4}, [0, 4, 8], [0, 4, 8]),
        ({"full_every": 1}, list(range(10)), list(range(10))),
        ({"full_every": 4, "warmup_steps": 1}, [0, 4, 8], [0, 4, 8]),
        ({"full_every": 4, "warmup_steps": 2}, [0, 1, 5, 9], [0, 1, 5, 9]),
        ({"full_every": 3, "warmup_steps": 5}, [0, 1, 2, 3, 4, 7], [0, 1, 2, 3, 4, 7]),
        ({"recipe": "stack", "full_every": 4, "warmup_steps": 2}, [0, 1, 5, 9], [0, 1, 5, 9]),
        ({"full_steps": [0, 1, 7]}, [0, 1, 7], [0, 1, 7]),
        ({"attention_every": 2, "full_every": 4}, [0, 2, 4, 6, 8], [0, 4, 8]),
        ({"experts_every": 3, "full_every": 5}, [0, 5], [0, 3, 6, 9]),
        ({"attention_every": 3, "experts_every": 2}, [0, 3, 6, 9], [0, 2, 4, 6, 8]),
        ({"attention_every": 3, "full_steps": [0, 5]}, [0, 3, 6, 9], [0, 5]),
        ({"recipe": "stack", "attention_every": 2, "experts_every": 4}, [0, 4, 8], [0, 4, 8]),
    ],
    ids=str,
)
def test_steps(options, attention, experts):
    assert parts(10, **options) == (attention, experts)


def planned(steps: int, length: int | None, **options) -> list[int]:
    """The full steps of a generation of `length` steps that was expected to have `steps`."""
    plan = schedule(**{"schedule": "power", **options})
    return [n for n in range(length or steps) if plan.parts_to_refresh(n - 1, n - 1, n, steps) == EVERYTHING]


def test_a_power_schedule_has_as_many_full_steps_the_closer_the_later():
    # S (1 - (1 - i/F)^1.45) for 13 of 50 steps.
    assert planned(50, None) == [0, 5, 11, 16, 21, 25, 30, 34, 37, 41, 44, 47, 49]
    assert planned(50, None, schedule_exponent=1.0) == [round(50 * i / 13) for i in range(13)]
    assert planned(4, None, full_every=1) == [0, 1, 2, 3]
    # One step less, and one full step less.
    after = [1 + round(49 * (1 - (1 - i / 12) ** 1.45)) for i in range(12)]
    assert planned(50, None, warmup_steps=2) == [0, *after]
    assert planned(8, None, warmup_steps=4) == [0, 1, 2, 3]
    assert planned(3, None) == [0]


def test_a_tapered_schedule_starts_evenly_and_ends_like_a_power_schedule():
    # S (1 - (1 - i/F)^1.45 (1 + 0.45 i/F)) for 10 and 13 of 50 steps.
    assert planned(50, None, schedule="tapered", full_every=5) == [0, 5, 11, 16, 22, 28, 33, 39, 43, 48]
    assert planned(50, None, schedule="tapered") == [
        round(50 * (1 - (1 - i / 13) ** 1.45 * (1 + 0.45 * i / 13))) for i in range(13)
    ]
    assert planned(50, None, schedule="tapered", schedule_exponent=1.0) == [round(50 * i / 13) for i in range(13)]
    assert planned(4, None, schedule="tapered", full_every=1) == [0, 1, 2, 3]
    assert planned(3, None, schedule="tapered") == [0]
    after = [1 + round(49 * (1 - (1 - i / 12) ** 1.45 * (1 + 0.45 * i / 12))) for i in range(12)]
    assert planned(50, None, schedule="tapered", warmup_steps=2) == [0, *after]


@pytest.mark.parametrize("steps", [20, 50, 250, 1000])
@pytest.mark.parametrize("every", [2, 3, 5, 6, 10])
def test_no_gap_at_the_start_of_a_tapered_schedule_is_longer_than_an_even_one(steps: int, every: int):
    tapered, power = (planned(steps, None, schedule=name, full_every=every) for name in ("tapered", "power"))
    assert len(tapered) == len(power) == -(-steps // every) and tapered[0] == 0
    gap = steps / len(tapered)
    assert tapered[1] <= round(gap * 1.15)
    assert power[1] >= tapered[1] and steps - tapered[-1] <= -(-gap // 1)


def test_every_schedule_with_an_exponent_has_a_formula():
    assert set(CURVED) == set(WITH_EXPONENT) < set(SCHEDULES)


@pytest.mark.parametrize("recipe", ["moeca", "stack"])
def test_a_generation_longer_than_expected_goes_on_evenly(recipe):
    assert planned(8, 20, recipe=recipe) == [0, 5, 8, 12, 16]


@pytest.mark.parametrize("recipe", ["moeca", "stack"])
@pytest.mark.parametrize(
    ("expected", "length", "full"),
    [
        (None, 8, [0, 3, 6, 7]),
        (8, 8, [0, 3, 6, 7]),
        (8, 5, [0, 3]),
        (8, 20, [0, 3, 6, 7, 8, 12, 16]),  # beyond the plan every fourth, the first at once
        (None, 12, [0, 3, 6, 7, 8]),
        (4, 4, [0, 3]),  # spread alike over another number of steps
        (16, 16, [0, 3, 6, 9, 12, 13, 14, 15]),
    ],
    ids=str,
)
def test_a_calibrated_schedule_has_its_full_steps_and_goes_on_soundly(recipe, expected, length, full):
    plan = schedule(recipe=recipe, schedule=Calibrated(8, (0, 3, 6, 7)))
    assert [
        number
        for number in range(length)
        if plan.parts_to_refresh(number - 1, number - 1, number, expected) == EVERYTHING
    ] == full


def test_toca_s_steps_are_those_of_its_code():
    """By hand, with 20 steps and N = 4: after 19 multiples of 6 (4 / 0.64), after 12 of 4 (4 / 0.92), then of 2."""
    assert [19 - number for number in toca_steps(20, 4)] == [19, 18, 12, 8, 4, 2, 0]
    assert len(toca_steps(50, 4)) == 17 and len(toca_steps(250, 4)) == 74
    assert toca_steps(1, 4) == (0,) and toca_steps(50, 1) == tuple(range(50))
    plan = schedule(recipe="toca", warmup_steps=3)
    full = [n for n in range(22) if plan.parts_to_refresh(n - 1, n - 1, n, 22) == EVERYTHING]
    assert full == [0, 1, *(2 + n for n in toca_steps(20, 4))]


@pytest.mark.parametrize("steps", range(1, 7))
@pytest.mark.parametrize("warmup", range(6))
def test_toca_s_schedule_of_generations_no_longer_than_the_warmup(steps, warmup):
    plan = schedule(recipe="toca", warmup_steps=warmup)
    full = [n for n in range(steps) if plan.parts_to_refresh(n - 1, n - 1, n, steps) == EVERYTHING]
    before = list(range(min(steps, max(warmup, 1))))
    assert full[: len(before)] == before and full[-1] == steps - 1


def test_without_a_number_of_steps_it_is_even():
    assert parts(10, schedule="power") == ([0, 4, 8], [0, 4, 8])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 20), st.floats(1, 4))
def test_power_steps_ascend_from_0_and_are_as_many_as_asked(steps, every, exponent):
    full = -(-steps // every)
    found = power_steps(steps, full, exponent)
    assert len(found) == full and list(found) == sorted(set(found))
    assert found[0] == 0 and found[-1] < steps


@pytest.mark.parametrize("options", [{}, {"full_every": 7}, {"attention_every": 3}, {"full_steps": [0]}], ids=str)
def test_the_first_call_computes_everything(options):
    """Whatever the number of the step at which it comes."""
    assert schedule(**options).parts_to_refresh(-1, -1, 0) == RefreshPlan(True, True)
    assert schedule(**options).parts_to_refresh(-1, -1, 5) == RefreshPlan(True, True)


def due(options: dict, interval: str, number: int) -> bool:
    """Whether a part is due at a step, by the words of the options' documentation."""
    if options.get(interval):
        return number % options[interval] == 0
    return number in options["full_steps"] if "full_steps" in options else number % options.get("full_every", 4) == 0


def by_walking(options: dict, attention_at: int, experts_at: int, number: int) -> RefreshPlan:
    """What step `number` computes anew: a look at each step since."""
    found = {}
    for name, last in (("attention_every", attention_at), ("experts_every", experts_at)):
        names = ("attention_every", "experts_every") if options.get("recipe") == "stack" else (name,)
        found[name] = any(all(due(options, each, n) for each in names) for n in range(last + 1, number + 1))
    return RefreshPlan(*found.values())


lists = st.lists(st.integers(0, 60), max_size=8).map(lambda steps: {"full_steps": [0, *steps]})
intervals = st.fixed_dictionaries(
    {}, optional={name: st.integers(1, 9) for name in ("attention_every", "experts_every")}
)
shared = st.one_of(st.just({}), lists, st.integers(1, 9).map(lambda every: {"full_every": every}))
recipes = st.sampled_from([{}, {"recipe": "stack"}])


@settings(max_examples=300, deadline=None)
@given(recipes, shared, intervals, st.integers(-1, 50), st.integers(-1, 50), st.integers(0, 12))
def test_what_is_due_is_what_a_walk_over_the_steps_finds(recipe, common, every, attention_at, experts_at, later):
    options = {**recipe, **common, **every}
    if len(every) == 2:  # the common steps would have no effect, which is an error
        options = {**recipe, **every}
    number = max(attention_at, experts_at, 0) + later
    expected = by_walking(options, attention_at, experts_at, number)
    assert schedule(**options).parts_to_refresh(attention_at, experts_at, number) == expected


@pytest.mark.parametrize("options", [{"full_every": 1_000_000}, {"full_steps": [0, 20_000]}], ids=str)
def test_ten_thousand_steps_since_the_last_are_no_more_work_than_ten(options):
    plan = schedule(**options)
    counts = [calls_of(lambda n=number: plan.parts_to_refresh(0, 0, n)) for number in (10, 10_000)]
    assert counts[0] == counts[1] > 0
