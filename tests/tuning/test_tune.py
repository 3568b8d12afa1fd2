"""A whole tune of a small model, its file, and its use in the same process."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import replace

import pytest
import torch

import moeca_compile
from moeca_compile import ConfigError, Tuned, tune
from moeca_compile.runtime.record import _by_module
from moeca_compile.tuning import tune as module
from moeca_compile.tuning.measure import usual_options
from moeca_compile.tuning.reference import Reference
from moeca_compile.tuning.wish import Wish
from tests.tuning.tiny import EAGER, loop, small

STEPS = 6


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The outcome, its model, and the file of its rows."""
    model, path = small(), tmp_path_factory.mktemp("tune") / "rows.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tune(model, loop(STEPS), psnr=25.0, seeds=3, options=EAGER, resume=path), model, path


def test_what_it_finds(tuned):
    found, model, _ = tuned
    assert (found.steps, found.calls, found.seeds, found.held_back) == (STEPS, STEPS, (0, 1), (2,))
    assert found.met and found.row.psnr >= 25.0 and found.options["recipe"] in ("stack-forecast", "fora-forecast")
    assert 8 <= len(found.rows) <= 16 and len({row.name for row in found.rows}) == len(found.rows)
    default = found.named(found.default)
    assert default.name.startswith("stack-forecast, tapered")
    assert found.row.held_back_psnr >= min(25.0, default.held_back_psnr)
    assert set(found.schedules) == {1, 2, 3}
    speeds, qualities = ([getattr(row, name) for row in found.frontier] for name in ("speedup", "quality"))
    assert speeds == sorted(speeds, reverse=True) and qualities == sorted(qualities)
    assert sum(weight.numel() for weight in model.parameters()) == found.model.elements
    assert found.chosen in str(found) and "held back" in str(found)


def test_it_leaves_no_record_with_the_model(tuned):
    assert tuned[1] not in _by_module


def test_more_full_steps_are_nearer(tuned):
    found, _, _ = tuned
    usual = {row.full_steps: row.psnr for row in found.rows if row.name.startswith("stack-forecast, tapered")}
    assert len(usual) > 1 and usual[max(usual)] > usual[min(usual)]


def test_the_file_is_taken_in_the_same_process_and_runs_what_was_measured(tuned, tmp_path):
    """A dozen compilations of the model's code came before: Dynamo would have given it up."""
    found, model, _ = tuned
    path = tmp_path / "tuned.json"
    found.save(path)
    assert Tuned.load(path) == found
    compiled = torch.compile(model, backend="moeca", options={"tuned": path})
    with torch.no_grad():
        loop(STEPS)(compiled, 0)
    full = found.row.full_steps
    assert moeca_compile.report(compiled).steps == {"full": full, "cache": STEPS - full}
    assert moeca_compile.report(compiled).warnings == ()


def test_its_schedules_are_taken_by_other_recipes(tuned, tmp_path):
    found, _, _ = tuned
    path = tmp_path / "tuned.json"
    found.save(path)
    config = moeca_compile.MoecaConfig(recipe="fora", schedule=str(path), full_every=2)
    assert config.schedule.full_steps == found.schedules[3]


def test_a_second_start_measures_nothing(tuned, monkeypatch):
    from moeca_compile.tuning.measure import Measure

    found, model, path = tuned
    monkeypatch.setattr(Measure, "_measured", lambda *_: pytest.fail("measured again"))
    assert tune(model, loop(STEPS), psnr=25.0, seeds=3, options=EAGER, resume=path) == found


def test_rows_of_another_loop_are_refused(tuned):
    _, model, path = tuned
    with pytest.raises(ValueError, match="steps was 6 there and is 5 now"):
        tune(model, loop(5), psnr=25.0, seeds=3, options=EAGER, resume=path)


def test_rows_of_another_metric_or_other_outputs_are_refused(tuned):
    _, model, path = tuned
    with pytest.raises(ValueError, match=r"metric was None there and is '.*nearness' now"):
        tune(model, loop(STEPS), psnr=25.0, seeds=3, options=EAGER, resume=path, metric=nearness)
    shifted = lambda model, seed: loop(STEPS)(model, seed).flip(0)  # noqa: E731 - equal mean and deviation
    with pytest.raises(ValueError, match=r"the uncached outputs were others there \(-?\d+ dB apart\)"):
        tune(model, shifted, psnr=25.0, seeds=3, options=EAGER, resume=path)


def nearness(outputs, wanted):
    return -float((outputs - wanted).abs().max())


def test_a_row_of_the_file_that_was_not_asked_for_is_not_chosen(tuned, tmp_path):
    found, model, path = tuned
    values, copied = json.loads(path.read_text()), tmp_path / "rows.json"
    values["rows"].append({**values["rows"][0], "name": "fora, power 3", "speedup": 1e6, "psnr": 149.0, "note": ""})
    copied.write_text(json.dumps(values))
    again = tune(model, loop(STEPS), psnr=25.0, seeds=3, options=EAGER, resume=copied)
    assert again == found


@pytest.mark.parametrize("recipe", ["moeca", "delta", "toca", "duca"])
def test_the_corrector_is_asked_of_recipes_that_take_it(recipe):
    def begun(model, seed):
        raise KeyError("begun")

    with pytest.raises(KeyError, match="begun"):
        tune(small(), begun, psnr=25.0, recipes=[recipe])
    assert usual_options(recipe, {}) == {"recipe": recipe}
    assert usual_options("stack", {}) == {"recipe": "stack", "corrector": True}
    assert usual_options("stack", {"corrector": False}) == {"recipe": "stack", "corrector": False}


def test_the_plot_has_all_rows_and_marks_the_chosen_one(tuned):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    ax = tuned[0].plot()
    points = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in ax.get_lines()}
    assert len(points["measured"]) == len(tuned[0].rows)
    assert points["chosen"] == [(tuned[0].row.speedup, tuned[0].row.psnr)]
    assert len(points["frontier"]) == len(tuned[0].frontier)
    pyplot.close("all")


@pytest.mark.slow  # a tune of its own; what it would say is among the tests below
def test_a_wish_that_was_not_met_is_warned_of(tuned, monkeypatch):
    _, model, path = tuned
    with pytest.warns(UserWarning, match=r"the wish psnr=149 was not met. The nearest of what was tried"):
        found = tune(model, loop(STEPS), psnr=149.0, seeds=3, options=EAGER, resume=path)
    assert not found.met and "not met" in str(found)


def test_what_the_user_should_know_of_an_outcome(tuned):
    found, _, _ = tuned
    known = Reference({}, 7, 6, None, None, 1.0)
    assert list(module._warnings(found, Wish("psnr", 25.0), known, {"calibrated": {}}, ())) == []
    (text,) = module._warnings(found, Wish("psnr", 25.0), known, {}, ())
    assert "the 7 calls of the model are no whole number for each of 6 steps" in text
    (text,) = module._warnings(found, Wish("psnr", 25.0), known, {"calibrated": {}}, ("the graph breaks",))
    assert text.endswith("is not as fast as it could be: the graph breaks")


def test_a_choice_that_is_worse_on_held_back_seeds_is_said(tuned):
    found, _, _ = tuned
    worse = replace(found.row, name="worse", held_back_psnr=-1.0, warnings=("crowded",), uncached_psnr=24.0)
    poor = replace(found, wish={"psnr": 149.0}, met=False, chosen="worse", rows=(*found.rows, worse))
    assert found.held_up and "worse than the default" not in str(found) and not poor.held_up
    assert "on the held-back seeds the chosen one is worse than the default" in str(poor)
    assert "worse: crowded" in str(poor) and "uncached, compiled: 24.0 dB" in str(poor)
    known = Reference({}, 6, 6, None, None, 1.0)
    not_met, not_held = module._warnings(poor, Wish("psnr", 149.0), known, {"calibrated": {}}, ())
    assert "itself, compiled, is at 24.0 dB" in not_met and "the chosen 'worse' is worse than" in not_held


def test_the_log_says_how_far_it_is(tuned, caplog):
    _, model, path = tuned
    with caplog.at_level(logging.INFO, "moeca_compile.tuning.shown"):
        tune(model, loop(STEPS), psnr=25.0, seeds=3, options=EAGER, resume=path)
    assert "uncached, 4 generations" in caplog.text


def test_options_are_kept_in_plain_values():
    given = {"forecast": ("stack",), "cache_dtype": torch.bfloat16, "lowering": "eager"}
    assert module._plain(given) == {"forecast": ["stack"], "cache_dtype": "bfloat16", "lowering": "eager"}


def never(model, seed):
    pytest.fail("work began before the arguments were checked")


WRONG = {
    "exactly one of speedup": ({}, ValueError),
    "a finite number above 0": ({"psnr": -1.0}, ValueError),
    "a number of seeds >= 2": ({"psnr": 40.0, "seeds": 1}, ValueError),
    "at least two different": ({"psnr": 40.0, "seeds": [3, 3]}, ValueError),
    "a list of at least one name": ({"psnr": 40.0, "recipes": "stack"}, ValueError),
    "did you mean": ({"psnr": 40.0, "options": {"cache_dtyp": None}}, ConfigError),
    "the tuner decides on full_every": ({"psnr": 40.0, "options": {"full_every": 3}}, ValueError),
    "'recipe' = 'stakc'": ({"psnr": 40.0, "recipes": ["stakc"]}, ConfigError),
    "'teacache' has no schedule of full steps. tune tries recipes with a schedule: auto, ": (
        {"psnr": 40.0, "recipes": ["teacache"]},
        ValueError,
    ),
    "recipe 'toca' ignores it": ({"psnr": 40.0, "recipes": ["toca"], "options": {"corrector": True}}, ConfigError),
    "recipe 'delta' ignores it": ({"psnr": 40.0, "recipes": ["delta"], "options": {"max_error": 0.1}}, ConfigError),
    "it is for deterministic samplers": (
        {"psnr": 40.0, "recipes": ["auto"], "options": {"max_error": 0.1, "sampler": "stochastic"}},
        ConfigError,
    ),
    "name a file in a folder that exists": ({"psnr": 40.0, "resume": "nowhere/rows.json"}, ValueError),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_errors_before_any_work(message):
    arguments, kind = WRONG[message]
    with pytest.raises(kind) as caught:
        tune(small(), never, **arguments)
    assert message in str(caught.value)


def test_models_that_cannot_be_tuned_are_errors_before_any_work():
    model = small()
    with pytest.raises(ValueError, match="compiled already"):
        tune(torch.compile(model), never, psnr=40.0)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        tune(model.train(), never, psnr=40.0)
    with pytest.raises(ValueError, match=r"must be an nn\.Module"):
        tune(never, never, psnr=40.0)


def test_a_file_that_is_none_cannot_be_loaded(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"moeca_tuned": 1}')
    with pytest.raises(ValueError, match="is damaged"):
        Tuned.load(path)
    with pytest.raises(ValueError, match="there is no file"):
        Tuned.load(tmp_path / "y.json")
