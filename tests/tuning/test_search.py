"""What is chosen among candidates whose times and qualities are known by formula."""

from __future__ import annotations

import math

import pytest

from moeca_compile.tuning.measure import Candidate
from moeca_compile.tuning.rows import Row, Store
from moeca_compile.tuning.search import NothingCachedError, search
from moeca_compile.tuning.wish import Wish, wish_of

STEPS, FULL, CACHE = 50, 1.0, 0.02
GAIN = {"uniform": -4.0, "power": -1.0, "tapered": 0.0, "calibrated": 1.0, "calibrated-mean": 0.5}


def row_of(name: str, full: int, seconds: float, psnr: float, held: float, options=None, note="") -> Row:
    return Row(
        name=name,
        options=options or {},
        full_steps=full,
        seconds=seconds,
        uncached_seconds=STEPS * FULL,
        speedup=STEPS * FULL / seconds,
        times=(seconds,),
        uncached_times=(STEPS * FULL,),
        compile_seconds=1.0,
        flops_speedup=None,
        cache_bytes=1,
        psnr=psnr,
        psnr_worst=psnr - 5,
        ssim=None,
        metric=None,
        held_back_psnr=held,
        held_back_metric=None,
        note=note,
    )


class Formula:
    """In place of Measure: 6 dB for each doubling of full steps, and seconds that are linear in them."""

    def __init__(self, held=lambda candidate: 0.0, gain=lambda candidate: 0.0, idle=(), options=None, spoilt=()):
        self.steps, self.options, self.store = STEPS, options or {}, Store(None, {})
        self.held, self.gain, self.idle, self.spoilt = held, gain, idle, spoilt
        self.tables = {kind: {full: (0,) for full in range(1, 26)} for kind in ("calibrated", "calibrated-mean")}
        self.measured: list[Candidate] = []

    def options_of(self, candidate: Candidate):
        found = {"recipe": candidate.recipe, "schedule": {"steps": STEPS, "full_steps": [0]}, "corrector": True}
        for _, more in candidate.more:
            found |= more
        return found

    def row(self, candidate: Candidate) -> Row:
        known = self.store.known(candidate.name, self.options_of(candidate))
        if known is None:
            self.measured.append(candidate)
            psnr = 30 + 6 * math.log2(candidate.full / 4) + GAIN[candidate.schedule] + self.gain(candidate)
            each = CACHE if candidate.recipe.startswith("stack") else 2 * CACHE
            seconds = FULL * candidate.full + each * (STEPS - candidate.full)
            note = "nothing to cache" if candidate.recipe in self.idle else ""
            if (candidate.schedule, candidate.full) in self.spoilt:
                psnr, note = -150.0, "not finite"
            held = psnr + self.held(candidate)
            known = row_of(candidate.name, candidate.full, seconds, psnr, held, self.options_of(candidate), note)
            self.store.add(known)
        return known


RECIPES = ("stack-forecast", "fora-forecast")
BROADER = -1.0
"""What bfloat16 and no corrector cost here."""


def worse_with_more(candidate: Candidate) -> float:
    return BROADER * len(candidate.more)


def test_the_best_that_is_fast_enough():
    formula = Formula(gain=worse_with_more)
    found = search(formula, Wish("speedup", 4.0), RECIPES)
    # 50 / (F + 0.02 (50 - F)) >= 4 holds up to F = 11.
    assert found.met and found.chosen.full_steps == found.default.full_steps == 11
    assert found.default.name == "stack-forecast, tapered 11"
    assert found.chosen.name == "stack-forecast, calibrated 11" and found.kind == "calibrated"
    assert len(formula.measured) <= 15


def test_the_fastest_that_is_near_enough():
    found = search(Formula(gain=worse_with_more), Wish("psnr", 42.0), RECIPES)
    # 30 + 6 log2(F / 4) >= 42 from F = 16 on by the default; calibrated has 1 dB more, from F = 15 on.
    assert found.met and (found.default.full_steps, found.chosen.full_steps) == (16, 15)
    assert found.chosen.name == "stack-forecast, calibrated 15"


def test_seconds_are_a_wish_of_speed():
    found = search(Formula(gain=worse_with_more), Wish("seconds", 12.5), RECIPES)
    assert found.met and found.chosen.full_steps == 11 and found.chosen.seconds <= 12.5


def test_options_that_help_are_kept():
    found = search(Formula(gain=lambda candidate: 2.0 * len(candidate.more)), Wish("speedup", 4.0), RECIPES)
    assert found.chosen.name == "stack-forecast, calibrated 11, half slope, no corrector, bfloat16 caches"
    assert found.chosen.options["forecast_slope"] == 0.5 and found.chosen.options["corrector"] is False


def test_what_fails_on_held_back_seeds_is_not_taken():
    """The calibrated schedules look better on the seeds that decide, and are worse on the others."""

    def overfit(candidate: Candidate) -> float:
        return -20.0 if candidate.schedule.startswith("calibrated") else 0.0

    found = search(Formula(held=overfit, gain=worse_with_more), Wish("speedup", 4.0), RECIPES)
    assert found.chosen is found.default and found.chosen.held_back_psnr == found.default.held_back_psnr


def test_what_the_user_has_decided_is_left_alone():
    formula = Formula(gain=lambda candidate: 2.0 * len(candidate.more), options={"cache_dtype": "float32"})
    assert "bfloat16" not in search(formula, Wish("speedup", 4.0), RECIPES).chosen.name


def test_a_recipe_that_caches_nothing_gives_way():
    formula = Formula(idle=("stack-forecast",), gain=worse_with_more)
    found = search(formula, Wish("speedup", 4.0), RECIPES)
    assert found.default.name.startswith("fora-forecast, tapered") and found.chosen.note == ""
    assert sum(candidate.recipe == "stack-forecast" for candidate in formula.measured) == 1
    with pytest.raises(NothingCachedError, match="stack-forecast: nothing to cache; fora-forecast: nothing to cache"):
        search(Formula(idle=RECIPES), Wish("speedup", 4.0), RECIPES)


def test_rows_that_cannot_be_chosen_are_not_and_the_search_goes_on():
    spoilt = [("tapered", 11), ("calibrated", 10), ("calibrated", 9)]
    found = search(Formula(gain=worse_with_more, spoilt=spoilt), Wish("speedup", 4.0), RECIPES)
    assert found.met and not found.chosen.note and not found.default.note and found.kind is not None
    assert found.default.full_steps != 11


@pytest.mark.parametrize(("wish", "full"), [(Wish("speedup", 45.0), 1), (Wish("psnr", 90.0), 49)])
def test_a_wish_that_nothing_meets_gets_the_nearest(wish, full):
    found = search(Formula(gain=worse_with_more), wish, RECIPES)
    assert not found.met and found.chosen.full_steps == full


@pytest.mark.parametrize("steps", [2, 3, 4, 5])
@pytest.mark.parametrize("wish", [Wish("speedup", 1.5), Wish("psnr", 35.0)])
def test_short_generations_have_rows_within_their_steps(steps, wish, monkeypatch):
    formula = Formula(gain=worse_with_more)
    formula.steps = steps
    search(formula, wish, RECIPES)
    assert all(1 <= candidate.full < max(steps, 3) for candidate in formula.measured)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of speedup, psnr and seconds .* got none"),
        ({"speedup": 4.0, "psnr": 40.0}, "got speedup, psnr"),
        ({"speedup": 1.0}, "a number above 1"),
        ({"seconds": 0.0}, "a finite number above 0"),
        ({"psnr": math.nan}, "a finite number above 0"),
        ({"psnr": "40"}, "a finite number above 0"),
        ({"speedup": True}, "a finite number above 0"),
    ],
    ids=str,
)
def test_a_wish_that_is_none_is_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        wish_of(**{"speedup": None, "psnr": None, "seconds": None, **given})
