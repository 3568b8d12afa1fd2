"""MoecaConfig: defaults, recipes, normal forms, and errors that name the field, the value, the allowed."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeca_compile.config import RECIPES, MoecaConfig
from moeca_compile.options import UNSET, ConfigError

pytestmark = pytest.mark.smoke

# One wrong value or more for each field, with a piece of what the error must offer instead.
WRONG = [
    ("recipe", "moecca", "'moeca-forecast'"),
    ("recipe", None, "'moeca'"),
    ("full_every", 0, ">= 1"),
    ("full_every", 2.5, "whole number"),
    ("full_every", True, "whole number"),
    ("schedule", "cosine", "'power'"),
    ("schedule", "/nowhere/tuned.json", "there is no file"),
    ("schedule", 3, "moeca_compile.tune wrote"),
    ("tuned", "/nowhere/tuned.json", "there is no file"),
    ("tuned", 3, "moeca_compile.tune wrote"),
    ("schedule_exponent", 0.5, "[1, inf)"),
    ("sampler", "euler", "'deterministic'"),
    ("forecast_slope", 1.5, "[0, 1]"),
    ("forecaster", "newton", "'taylorseer'"),
    ("forecast_order", 5, "from 0 to 4"),
    ("corrector", 1, "True | False"),
    ("max_error", 0.0, "None or a finite number in (0, inf)"),
    ("warmup_steps", -1, ">= 0"),
    ("first_blocks", -1, ">= 0"),
    ("last_blocks", 0.5, "whole number"),
    ("cached_blocks", 1.0, "(0, 1)"),
    ("boundary", 1.5, "[0, 1]"),
    ("fresh_ratio", -0.1, "[0, 1]"),
    ("token_score", "norm", "'value_norm'"),
    ("full_steps", (), "contains 0"),
    ("full_steps", (4, 8), "contains 0"),
    ("full_steps", (0, -3), ">= 0"),
    ("full_steps", 5, "list or tuple"),
    ("reuse_threshold", -0.1, "[0, inf)"),
    ("max_reused", -1, "None or a whole number >= 0"),
    ("warmup_steps", 1.5, "whole number >= 0"),
    ("rescale", (), "at least one finite number"),
    ("rescale", (1.0, float("nan")), "finite"),
    ("magnitude_ratios", (1.0,), "at least two positive numbers"),
    ("magnitude_ratios", (1.0, 0.0), "report(model).magnitude_ratios has it"),
    ("magnitude_ratios", "/nowhere/ratios.json", "No such file"),
    ("retention", 1.5, "[0, 1]"),
    ("attention_every", 0, "None or a whole number"),
    ("experts_every", "4", "None or a whole number"),
    ("tau0", -0.1, "[0, inf)"),
    ("tau0", float("nan"), "finite"),
    ("tau0", None, "finite"),
    ("alpha", 1.0, "[0, 1)"),
    ("beta", 1, "[0, 1)"),
    ("lambda1", float("inf"), "finite"),
    ("lambda2", -1e-9, "[0, inf)"),
    ("keys_values", "some", "'chosen'"),
    ("mask_source", "layer", "'previous'"),
    ("shared", True, "'always'"),
    ("entropy", "log2", "'minmax'"),
    ("statistic", "token", "'batch'"),
    ("score_weights", "softmax", "'raw'"),
    ("score", ["paper"], "'staleness'"),
    ("overwrite", 1, "True | False"),
    ("budget", 1.5, "[0, 1]"),
    ("forecast", "attention", "list or tuple"),
    ("forecast", ("attention", "keys"), "'experts'"),
    ("capacities", (), "end in 1.0"),
    ("capacities", (0.5,), "end in 1.0"),
    ("capacities", (0.5, 0.25, 1.0), "ascending"),
    ("capacities", (0.0, 1.0), "(0, 1]"),
    ("branches_per_token", 0.0, "(0, inf)"),
    ("max_generations", 0, ">= 1"),
    ("max_shapes", 0, "a whole number >= 1"),
    ("dynamic_batch", "yes", "None or True | False"),
    ("validate", "yes", "True | False"),
    ("tolerance", 0, "(0, inf)"),
    ("max_cache_bytes", -1, "None, 'auto' or a whole number >= 0"),
    ("max_cache_bytes", "half", "'auto'"),
    ("coarser_caches", 1, "True | False"),
    ("check_inputs", 1, "True | False"),
    ("cache_dtype", "int8", "torch.bfloat16"),
    ("cache_dtype", torch.int64, "torch.bfloat16"),
    ("cuda_graphs", "auto", "True | False"),
    ("lowering", "triton", "'eager'"),
    ("disk_cache", 1, "True | False"),
    ("background", "yes", "True | False"),
    ("progress", "no", "True | False"),
    ("trace", "yes", "True | False"),
    ("dump", "", "a folder"),
    ("dump", "a\0b", "a folder"),
]


def test_the_default_forecasts_by_a_tapered_schedule():
    config = MoecaConfig()
    assert (config.recipe, config.schedule, config.full_every, config.sampler) == ("auto", "tapered", 4, None)
    assert config.forecast == ("stack", "attention", "experts") and not config.corrector


def test_the_defaults_of_moeca_are_the_paper_s():
    config = MoecaConfig(recipe="moeca")
    assert (config.full_every, config.tau0, config.alpha, config.beta) == (4, 0.8, 0.6, 0.65)
    assert (config.lambda1, config.lambda2, config.score, config.entropy) == (1.0, 0.6, "paper", "log")
    assert config.forecast == () and config.budget is None and config.full_steps is None
    assert config.capacities == (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_complete_and_round_trips(recipe):
    config = MoecaConfig(recipe=recipe)
    values = dataclasses.asdict(config)
    assert UNSET not in values.values()
    assert MoecaConfig(**values) == config == MoecaConfig.from_options(values)
    assert hash(MoecaConfig(**values)) == hash(config)


def test_a_recipe_sets_only_what_is_left_unset():
    assert MoecaConfig(recipe="moeca-forecast").forecast == ("attention", "experts", "shared")
    assert MoecaConfig(recipe="moeca-forecast", forecast=("attention",)).forecast == ("attention",)
    assert MoecaConfig(recipe="fora-forecast").forecast == ("attention", "experts")
    assert MoecaConfig(recipe="stack-forecast").forecast == ("stack",)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_of_one_policy_differ_in_their_forecast(recipe):
    config = MoecaConfig(recipe=recipe)
    assert config.policy is MoecaConfig(recipe=recipe.removesuffix("-forecast")).policy
    assert bool(config.forecast) == (recipe.endswith("-forecast") or recipe in ("taylorseer", "auto"))


@pytest.mark.parametrize(
    ("options", "ignored", "reason"),
    [
        ({"recipe": "stack", "tau0": 0.1}, "tau0", "recipe 'stack' ignores it; it is for moeca, moeca-forecast"),
        ({"recipe": "fora", "capacities": (1.0,)}, "capacities", "recipe 'fora' ignores it"),
        ({"recipe": "none", "full_every": 2}, "full_every", "recipe 'none' ignores it"),
        ({"recipe": "none", "forecast": ()}, None, ""),
        ({"recipe": "stack", "tau0": 0.8}, None, ""),
        ({"budget": 0.5, "tau0": 0.1}, "tau0", "a budget takes the place of the threshold"),
        ({"recipe": "moeca-forecast", "capacities": (1.0,)}, "capacities", "a budget takes the place"),
        ({"recipe": "moeca-forecast", "budget": None, "tau0": 0.1}, None, ""),
        ({"score": "drift", "lambda1": 2}, "lambda1", "the score is the drift alone"),
        ({"full_steps": (0, 3), "full_every": 2}, "full_every", "full_steps lists the full steps"),
        ({"full_steps": (0, 3), "schedule": "power"}, "schedule", "full_steps lists the full steps"),
        ({"schedule_exponent": 2}, "schedule_exponent", 'schedule="power"'),
        ({"schedule": "power", "schedule_exponent": 2}, None, ""),
        ({"schedule": "tapered", "schedule_exponent": 2}, None, ""),
        ({"attention_every": 2, "experts_every": 3, "schedule": "power"}, "schedule", "take its place"),
        ({"recipe": "stack", "forecast_slope": 0.5}, "forecast_slope", "nothing is forecast"),
        ({"recipe": "stack-forecast", "forecast_slope": 0.5}, None, ""),
        ({"recipe": "stack", "forecaster": "hermite"}, "forecaster", "nothing is forecast"),
        ({"recipe": "fora", "forecast_order": 2}, "forecast_order", "nothing is forecast"),
        ({"recipe": "stack-forecast", "forecast_order": 0, "forecaster": "hermite"}, "forecaster", "order 0 holds"),
        ({"recipe": "stack-forecast", "forecast_order": 0, "forecast_slope": 0.5}, "forecast_slope", "order 0 holds"),
        ({"recipe": "stack-forecast", "forecast_order": 2, "forecaster": "hermite"}, None, ""),
        ({"recipe": "none", "warmup_steps": 2}, "warmup_steps", "recipe 'none' ignores it"),
        ({"full_steps": (0, 3), "warmup_steps": 2}, "warmup_steps", "full_steps lists the full steps"),
        ({"recipe": "fora", "attention_every": 3, "warmup_steps": 2}, "warmup_steps", "count from the first step"),
        ({"recipe": "taylorseer", "tau0": 0.1}, "tau0", "recipe 'taylorseer' ignores it"),
        ({"recipe": "taylorseer", "schedule": "power", "forecast_order": 2}, None, ""),
        ({"corrector": True}, "corrector", "set budget to 0"),
        ({"corrector": True, "budget": 0}, None, ""),
        ({"full_steps": (0, 3), "full_every": 2, "score": "staleness"}, None, ""),
        ({"recipe": "stack", "full_steps": (0, 3), "full_every": 2}, "full_every", "full_steps lists the full steps"),
        (
            {"recipe": "fora", "attention_every": 2, "experts_every": 4, "full_every": 3},
            "full_every",
            "attention_every and experts_every take its place",
        ),
        ({"recipe": "stack", "reuse_threshold": 0.1}, None, ""),
        ({"recipe": "stack", "reuse_threshold": 0.2}, "reuse_threshold", "it is for teacache, block-cache, magcache"),
        ({"recipe": "teacache", "reuse_threshold": 0.2, "rescale": (2, 0)}, None, ""),
        ({"recipe": "teacache", "full_every": 2}, "full_every", "recipe 'teacache' ignores it"),
        ({"recipe": "teacache", "schedule": "power"}, "schedule", "recipe 'teacache' ignores it"),
        ({"recipe": "teacache", "first_blocks": 2}, "first_blocks", "it is for deepcache, block-cache"),
        ({"recipe": "block-cache", "full_steps": (0, 3)}, "full_steps", "recipe 'block-cache' ignores it"),
        ({"recipe": "block-cache", "rescale": (2, 0)}, "rescale", "it is for teacache"),
        ({"recipe": "magcache", "forecast_slope": 0.5}, "forecast_slope", "recipe 'magcache' ignores it"),
        ({"recipe": "magcache", "warmup_steps": 2}, "warmup_steps", "recipe 'magcache' ignores it"),
        ({"recipe": "magcache", "magnitude_ratios": [1, 0.9]}, None, ""),
        ({"validate": False, "tolerance": 0.1}, "tolerance", "nothing is validated"),
        ({"recipe": "moeca-forecast", "score": "drift"}, "score", "nothing is ranked"),
        ({"recipe": "moeca-forecast", "mask_source": "previous"}, "mask_source", "no token is chosen"),
        ({"recipe": "moeca-forecast", "keys_values": "none"}, "keys_values", "no token is chosen"),
        ({"recipe": "moeca-forecast", "keys_values": "all"}, None, ""),
        ({"recipe": "moeca-forecast", "shared": "any"}, "shared", "no token is chosen"),
        ({"recipe": "moeca-forecast", "shared": "always"}, None, ""),
        ({"budget": 0.5, "mask_source": "previous"}, None, ""),
        ({"recipe": "auto", "sampler": "stochastic", "corrector": True, "forecast_slope": 0.25}, None, ""),
        ({"recipe": "auto", "tau0": 0.1}, "tau0", "recipe 'auto' ignores it; it is for moeca, moeca-forecast"),
        ({"recipe": "stack-forecast", "sampler": "deterministic"}, "sampler", "it is for auto"),
    ],
    ids=str,
)
def test_an_option_that_has_no_effect_is_an_error_that_says_so(options, ignored, reason):
    """Unless it is set to what it would be anyway. These are for `moeca` where they name no recipe."""
    options = {"recipe": "moeca", **options}
    if ignored is None:
        MoecaConfig.from_options(options)
        return
    with pytest.raises(ConfigError, match=reason) as caught:
        MoecaConfig.from_options(options)
    assert caught.value.field == ignored


def test_options_that_are_no_dict_are_an_error():
    with pytest.raises(ConfigError, match="a dict of options by name"):
        MoecaConfig.from_options([("recipe", "moeca")])  # type: ignore[arg-type]


def test_a_dump_may_lie_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert MoecaConfig(dump="~/graphs").dump == "/home/me/graphs"


def test_a_name_of_before_is_taken():
    assert MoecaConfig(score_weights="normalised").score_weights == "normalized"


def test_no_options_are_the_defaults():
    assert MoecaConfig.from_options(None) == MoecaConfig.from_options({}) == MoecaConfig()


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoecaConfig().full_every = 5  # type: ignore[misc]


def test_values_are_kept_in_one_form():
    options = {
        "recipe": "moeca",
        "full_steps": [9, 0, 4, 4],
        "capacities": [0.5, 1],
        "cache_dtype": "torch.bfloat16",
        "forecast": ["shared", "attention"],
        "tau0": 1,
    }
    config = MoecaConfig.from_options(json.loads(json.dumps(options)))
    assert config.full_steps == (0, 4, 9)
    assert config.capacities == (0.5, 1.0)
    assert config.cache_dtype is torch.bfloat16
    assert config.forecast == ("attention", "shared")
    assert isinstance(config.tau0, float)


@pytest.mark.parametrize(("field", "value", "offer"), WRONG)
def test_a_wrong_value_names_field_value_and_what_is_allowed(field, value, offer):
    with pytest.raises(ConfigError) as caught:
        MoecaConfig.from_options({field: value})
    assert isinstance(caught.value, ValueError)
    assert (caught.value.field, caught.value.value) == (field, value) or value != value
    message = str(caught.value)
    assert repr(field) in message and repr(value) in message and offer in message


def test_every_field_has_a_wrong_value():
    assert {field for field, _, _ in WRONG} == {field.name for field in dataclasses.fields(MoecaConfig)}


@pytest.mark.parametrize(
    ("recipe", "forecast", "offer"),
    [
        ("none", ("attention",), "ignores it"),
        ("moeca", ("stack",), "('attention', 'experts', 'shared')"),
        ("fora", ("shared",), "('attention', 'experts')"),
        ("stack", ("attention",), "('stack',)"),
    ],
)
def test_a_recipe_forecasts_only_what_it_caches(recipe, forecast, offer):
    with pytest.raises(ConfigError) as caught:
        MoecaConfig(recipe=recipe, forecast=forecast)
    assert offer in str(caught.value) and repr(recipe) in str(caught.value)


@pytest.mark.parametrize(("name", "near"), [("ful_every", "full_every"), ("tau", "tau0"), ("capacity", "capacities")])
def test_an_unknown_option_gets_the_nearest_name(name, near):
    with pytest.raises(ConfigError) as caught:
        MoecaConfig.from_options({name: 1})
    assert repr(name) in str(caught.value) and f"did you mean {near!r}" in str(caught.value)


def test_an_option_like_no_other_gets_all_names():
    with pytest.raises(ConfigError) as caught:
        MoecaConfig.from_options({"zzz": 1})
    assert "did you mean" not in str(caught.value)
    assert all(field.name in str(caught.value) for field in dataclasses.fields(MoecaConfig))


@given(st.sets(st.integers(1, 200)), st.floats(0, 0.999), st.floats(0, 1e6))
def test_what_is_allowed_round_trips(steps, alpha, tau0):
    config = MoecaConfig(recipe="moeca", full_steps=(0, *steps), alpha=alpha, tau0=tau0)
    assert config.full_steps == (0, *sorted(steps))
    assert MoecaConfig(**dataclasses.asdict(config)) == config
