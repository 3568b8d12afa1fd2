"""Options and schedules from the file of a tune: taken, checked, and refused with what to do."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moeca_compile
from moeca_compile import ConfigError, MoecaConfig
from moeca_compile.options import UNSET
from moeca_compile.tuned_file import Calibrated, fingerprint
from tests.models import make_model
from tests.tuning.tiny import EAGER, loop, small, written


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "tuned.json", small())


# Options


def test_all_options_come_from_the_file(file):
    config = MoecaConfig.from_options({"tuned": str(file)})
    assert config.recipe == "stack-forecast" and config.corrector and config.cache_dtype is torch.bfloat16
    assert config.schedule == Calibrated(8, (0, 3, 6, 7)) and config.usual_steps == 8
    assert config.forecast == ("stack",), "what the file leaves out is the recipe's"
    assert UNSET not in dataclasses.asdict(config).values()


def test_what_is_given_beside_the_file_counts(file):
    config = MoecaConfig.from_options({"tuned": file, "cache_dtype": None, "schedule": "power"})
    assert (config.cache_dtype, config.schedule, config.usual_steps) == (None, "power", 8)


@pytest.mark.parametrize(
    ("given", "schedule"),
    [
        ({"full_every": 5}, "uniform"),
        ({"full_steps": [0, 2]}, "uniform"),
        ({"warmup_steps": 3}, "uniform"),
        ({"schedule": "power", "schedule_exponent": 2.0}, "power"),
    ],
    ids=str,
)
def test_what_says_where_full_steps_are_replaces_the_schedule_of_the_file(given, schedule, file):
    config = MoecaConfig.from_options({"tuned": file, **given})
    expected = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    assert {name: getattr(config, name) for name in given} == expected and config.schedule == schedule
    assert config.corrector and config.cache_dtype is torch.bfloat16, "the other options stay"
    assert MoecaConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize("given", [{"full_steps": [0, 2]}, {"sampler": "stochastic"}], ids=str)
def test_error_control_of_a_file_gives_way_to_what_is_given_beside_it(given, tmp_path):
    tuned = {"recipe": "auto", "schedule": {"steps": 8, "full_steps": [0, 3, 6, 7]}, "max_error": 0.1}
    file = written(tmp_path / "tuned.json", small(), options=tuned)
    assert MoecaConfig.from_options({"tuned": file}).max_error == 0.1
    config = MoecaConfig.from_options({"tuned": file, **given})
    assert config.max_error is None and MoecaConfig(**dataclasses.asdict(config)) == config
    with pytest.raises(ConfigError, match=r"'max_error' = 0\.2"):
        MoecaConfig.from_options({"tuned": file, "max_error": 0.2, **given})


def test_full_steps_given_beside_the_file_are_those_that_run(file):
    assert run({"tuned": file, "full_every": 8})[0] == {"full": 1, "cache": 7}


def test_a_tuned_config_round_trips(file):
    config = MoecaConfig.from_options({"tuned": file})
    assert MoecaConfig(**dataclasses.asdict(config)) == config == dataclasses.replace(config)
    assert hash(config) == hash(MoecaConfig.from_options({"tuned": str(file)}))
    assert config != dataclasses.replace(config, corrector=False)


def test_another_recipe_beside_the_file_is_an_error(file):
    with pytest.raises(ConfigError, match=r"for recipe 'stack-forecast'. Leave out tuned, or recipe = 'none'"):
        MoecaConfig.from_options({"tuned": file, "recipe": "none"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("{", "is damaged"),
        ("[]", "is not of moeca_compile.tune"),
        ('{"recipe": "stack"}', "is not of moeca_compile.tune"),
        ('{"moeca_tuned": 9}', "has format 9 and this version reads 1"),
        ('{"moeca_tuned": 1, "steps": 8}', "is damaged"),
    ],
)
@pytest.mark.parametrize("option", ["tuned", "schedule"])
def test_a_file_that_is_none_is_an_error_that_says_what_to_do(text, message, option, tmp_path):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        MoecaConfig.from_options({"recipe": "stack", option: str(path)} if option == "schedule" else {option: path})
    assert caught.value.field == option and "moeca_compile.tune" in str(caught.value)


def test_a_file_with_an_option_of_another_version_is_an_error(tmp_path):
    path = written(tmp_path / "x.json", small(), options={"recipe": "stack", "gone": 3})
    with pytest.raises(ConfigError, match="the option 'gone', which does not exist: tune again"):
        MoecaConfig.from_options({"tuned": path})


def test_a_folder_in_place_of_a_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        MoecaConfig(tuned=tmp_path)


# Schedules


def test_full_every_chooses_among_the_schedules_of_a_file(file):
    for every, listed in ((2, (0, 3, 6, 7)), (4, (0, 5)), (1, tuple(range(8)))):
        config = MoecaConfig(recipe="fora", schedule=str(file), full_every=every)
        assert config.schedule == Calibrated(8, listed)


def test_a_number_of_full_steps_that_the_file_lacks_is_an_error(file):
    with pytest.raises(ConfigError, match=r"no schedule with 3 full steps in 8, .* It has those with 2, 4"):
        MoecaConfig(recipe="stack", schedule=str(file), full_every=3)


@pytest.mark.parametrize("listed", [[1, 3], [0, 3, 3], [0, 5, 4], [0, 8], [], [0, 2.5], [0, True]], ids=str)
def test_a_damaged_schedule_is_an_error(listed, tmp_path):
    path = written(tmp_path / "x.json", small(), schedules={"4": listed})
    with pytest.raises(ConfigError, match="damaged"):
        MoecaConfig(recipe="stack", schedule=str(path), full_every=2)
    with pytest.raises(ConfigError, match=r"'uniform' \| 'power'"):
        MoecaConfig(recipe="stack", schedule={"steps": 8, "full_steps": listed})


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"full_steps": (0, 2)}, "schedule"),
        ({"warmup_steps": 2}, "warmup_steps"),
        ({"schedule_exponent": 2.0}, "schedule_exponent"),
        ({"recipe": "none"}, "schedule"),
        ({"recipe": "teacache"}, "schedule"),
    ],
    ids=str,
)
def test_options_without_effect_beside_a_calibrated_schedule_are_errors(options, field, file):
    with pytest.raises(ConfigError) as caught:
        MoecaConfig.from_options({"recipe": "stack", "schedule": str(file), **options})
    assert caught.value.field == field


@given(st.sets(st.integers(1, 39)), st.integers(1, 90))
def test_a_schedule_spreads_over_any_number_of_steps(later, steps):
    known = Calibrated(40, (0, *sorted(later)))
    found = known.over(steps)
    assert found[0] == 0 and list(found) == sorted(set(found)) and found[-1] < steps
    assert len(found) == max(1, round(len(known.full_steps) * steps / 40))
    assert known.over(40) == known.full_steps


def test_spread_full_steps_lie_where_they_lay():
    assert Calibrated(50, (0, 5, 20, 40)).over(100) == (0, 5, 10, 25, 40, 60, 80, 90)
    assert Calibrated(4, (0, 3)).over(8) == (0, 3, 6, 7)
    assert Calibrated(8, (0, 3, 6, 7)).over(4) == (0, 3)


# Models


def run(options, steps=8, generations=1, model=None, marks=None):
    model = model or small()
    compiled = torch.compile(model, backend="moeca", options=options)
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        for seed in range(generations):
            if marks:
                with moeca_compile.generation(**marks):
                    loop(steps)(compiled, seed)
            else:
                loop(steps)(compiled, seed)
    ours = [str(each.message) for each in told if "moeca:" in str(each.message)]
    return moeca_compile.report(compiled).steps, ours


def test_the_first_generation_has_the_full_steps_of_the_file(file):
    assert run({"tuned": file}) == ({"full": 4, "cache": 4}, [])


def test_a_tuned_power_schedule_holds_from_the_first_generation_on(tmp_path):
    options = {"recipe": "stack", "schedule": "power", "full_every": 2, **EAGER}
    path = written(tmp_path / "x.json", small(), options=options)
    found = []
    for chosen in ({"tuned": path}, options):
        torch._dynamo.reset()
        found.append(run(chosen)[0])
    # 0, 3, 6, 7 by S (1 - (1 - i/4)^1.45); even ones and the second step, which is uncertain, otherwise.
    assert found[0] == {"full": 4, "cache": 4}


def test_a_model_of_another_structure_is_an_error(file):
    with pytest.raises(Exception, match=r"tuned for a model of \d+ parameters with .* Take the file of this model"):
        run({"tuned": file}, model=make_model())


def test_shapes_alone_tell_models_apart():
    first, second = torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(6, 4, bias=False)
    assert fingerprint(first)[:2] == fingerprint(second)[:2] and fingerprint(first) != fingerprint(second)
    assert fingerprint(first) == fingerprint(torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False)))


def test_other_versions_are_warned_of(tmp_path):
    path = written(tmp_path / "x.json", small(), versions={"torch": "2.11.0", "moeca_compile": "0.1.0"})
    steps, (warning,) = run({"tuned": path})
    assert steps["cache"] == 4 and f"was tuned with torch 2.11.0 (now {torch.__version__})" in warning
    assert "moeca_compile" not in warning.partition("was tuned")[2]


@pytest.mark.parametrize("case", ["marked", "longer", "two shorter"])
def test_other_numbers_of_steps_go_on_soundly_with_one_warning(case, file):
    steps, generations, marks = {
        "marked": (4, 1, {"steps": 4}),
        "longer": (16, 1, {}),
        "two shorter": (6, 4, {}),
    }[case]
    found, told = run({"tuned": file}, steps, generations, marks=marks)
    (warning,) = told
    assert "tuned for generations of 8 steps" in warning
    expected = {
        "marked": {"full": 2, "cache": 2},  # 0, 3
        "longer": {"full": 6, "cache": 10},  # 0, 3, 6, 7, then every fourth: 8, 12
        # 0, 3 within the first; then the schedule spread over 6: 0, 2 and 4 or so.
        "two shorter": found,
    }[case]
    assert found == expected and sum(found.values()) == steps * generations


def test_a_single_generation_that_ends_early_is_no_other_number_of_steps(file):
    compiled = torch.compile(small(), backend="moeca", options={"tuned": file})
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        for steps in (5, 8, 8):
            x = torch.randn(2, 1, 8, 8)
            for i in range(steps):
                x = x - compiled(x, torch.full((2,), 1 - i / 8), torch.tensor([1, 2])) / 8
    assert not [each for each in told if "tuned for generations" in str(each.message)]


def test_the_report_has_the_schedule_in_plain_values(file):
    compiled = torch.compile(small(), backend="moeca", options={"tuned": file})
    with torch.no_grad():
        loop(8)(compiled, 0)
    values = json.loads(json.dumps(moeca_compile.report(compiled).to_dict()))
    assert values["config"]["schedule"] == [8, [0, 3, 6, 7]]
    assert str(moeca_compile.report(compiled)) and values["config"]["tuned"][0] == str(file)
