"""A model that is compiled stays compiled and cached, whatever else a process does; where not, a user is told."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.dit import sinusoidal
from moeca_compile import report, reset
from moeca_compile.reporting.found import record_of
from moeca_compile.runtime.engine import Engine
from tests.harness import own_warnings, replace_inductor
from tests.models import Sizes, TinyDiTMoE, make_inputs, make_model

pytestmark = pytest.mark.usefixtures("traced_once")
SIZES = Sizes(depth=2, width=16, heads=2, experts=4, expert_width=8)
STEPS = 6


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, recipe: str = "stack", **options: Any) -> Any:
    return torch.compile(model, backend="moeca", options={"lowering": "eager", "recipe": recipe, **options})


@torch.no_grad()
def generate(model: Callable[..., Tensor], steps: int = STEPS, batch: int = 2) -> Tensor:
    x, y = make_inputs(make_model(SIZES), batch)
    for number in range(steps):
        x = x - model(x, torch.full((batch,), 1 - number / steps), y) / steps
    return x


def engines(fast: Any) -> list[Engine]:
    record = record_of(fast)
    return record.engines if record else []


def forms(fast: Any) -> int:
    """How many graphs at how many input shapes are compiled."""
    return sum(len(engine.loops) for engine in engines(fast))


def assert_cached(fast: Any) -> None:
    """That the next generation has cache steps."""
    before = report(fast).steps.get("cache", 0)
    generate(fast)
    assert report(fast).steps["cache"] == before + 4


# Another user of the same code


@pytest.mark.sampled(2)
@pytest.mark.parametrize("other", ["the same model", "another of its class"])
def test_another_backend_between_two_generations_costs_one_uncached_call(other):
    model = make_model(SIZES)
    fast = compiled(model)
    generate(fast)
    plain = torch.compile(model if other == "the same model" else make_model(SIZES), backend="eager")
    for _ in range(3):
        generate(plain)
        generate(fast, steps=1)
        assert_cached(fast)
    assert report(fast).graphs == 1 and own_warnings(report(fast)) == []


def test_training_between_two_generations_costs_one_uncached_call():
    model = make_model(SIZES)
    fast = compiled(model)
    generate(fast)
    x, y = make_inputs(model)
    for _ in range(2):
        model.train().requires_grad_(True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast(x, torch.ones(2), y).sum().backward()
        model.eval().requires_grad_(False)
        generate(fast, steps=1)
        assert_cached(fast)


def test_a_user_is_told_when_another_backend_runs_between_the_steps_of_a_generation():
    model = make_model(SIZES)
    fast, plain = compiled(model), torch.compile(model, backend="eager")
    x, y = make_inputs(model)
    with pytest.warns(UserWarning, match="code around parts of the model as plain Python"), torch.no_grad():
        for number in range(140):
            t = torch.full((2,), 1 - number / 140)
            torch.testing.assert_close(fast(x, t, y), plain(x, t, y))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("earlier", ["live", "are gone"])
def test_the_tenth_model_of_a_class_is_cached_as_the_first(earlier):
    models = []
    for seed in range(10):
        fast = compiled(make_model(SIZES, seed=seed))
        generate(fast)
        assert report(fast).steps == {"full": 2, "cache": 4}
        if earlier == "live":
            models.append(fast)
    for fast in models:
        generate(fast)
        assert report(fast).steps == {"full": 4, "cache": 8}


class Guided(TinyDiTMoE):
    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([y, torch.full_like(y, self.sizes.classes)])
        one, other = self.forward(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return 2 * one - other


def guided() -> Guided:
    torch.manual_seed(0)
    return Guided(SIZES).eval().requires_grad_(False)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_report_of_a_model_that_was_never_called_names_methods_that_pass_it_by(in_place):
    fast = model = guided()
    if in_place:
        model.compile(backend="moeca")
    else:
        fast = compiled(model)
    generate(fast.forward_with_cfg)
    (warning,) = own_warnings(report(fast))
    assert "forward_with_cfg of Guided" in warning and "torch.compile(model.forward_with_cfg" in warning


def test_a_method_is_captured_whole():
    model = guided()
    expected = generate(model.forward_with_cfg)
    model.forward_with_cfg = compiled(model.forward_with_cfg, full_every=1)
    torch.testing.assert_close(generate(model.forward_with_cfg), expected)
    found = report(model.forward_with_cfg)
    assert (found.graphs, found.graph_breaks) == (1, ())
    assert {region.kind for region in found.regions} >= {"experts", "attention"}


# First inputs that show nothing


def test_after_a_first_call_with_nan_the_model_is_validated_and_cached():
    model = make_model(SIZES)
    fast = compiled(model, recipe="fora")
    x, y = make_inputs(model)
    with torch.no_grad():
        assert fast(x * float("nan"), torch.ones(2), y).isnan().any()
    assert report(fast).validation_errors == {} and report(fast).cache_bytes == 0
    assert "not finite" in report(fast).regions[0].reason
    generate(fast, steps=1)
    assert_cached(fast)
    assert {region.status for region in report(fast).regions} == {"cached"}
    assert "recomputed" in report(fast).validation_errors or "reused" in report(fast).validation_errors
    assert own_warnings(report(fast)) == []


def test_a_user_is_told_when_outputs_are_never_finite():
    model = make_model(SIZES)
    fast = compiled(model)
    x, y = make_inputs(model)
    with pytest.warns(UserWarning, match="infinities or NaNs in its first 8 calls"), torch.no_grad():
        for number in range(9):
            fast(x * float("nan"), torch.full((2,), 1 - number / 10), y)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", ["moeca", "fora", "block", "stack"])
def test_with_gates_of_zero_nothing_counts_as_validated_until_weights_are_loaded(recipe):
    model = make_model(SIZES)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    for block in model.blocks:
        nn.init.zeros_(block.adaLN_modulation[-1].weight)
        nn.init.zeros_(block.adaLN_modulation[-1].bias)
    fast = compiled(model, recipe)
    with pytest.warns(UserWarning, match="validated once the weights have changed"):
        generate(fast)
    assert any("not validated yet" in region.reason for region in report(fast).regions)
    model.load_state_dict(trained)
    generate(fast)
    assert not any("not validated yet" in region.reason for region in report(fast).regions)
    assert sum(report(fast).steps.values()) == 2 * STEPS
    before = forms(fast), len(engines(fast))
    model.load_state_dict(trained)
    generate(fast)
    assert (forms(fast), len(engines(fast))) == before


# Weights, shapes and strides


@pytest.mark.parametrize("move", ["data", "assign"])
def test_weights_that_move_compile_nothing_anew(move):
    model, other = make_model(SIZES), make_model(SIZES, seed=7)
    fast = compiled(model)
    generate(fast)
    spent = report(fast).compile_seconds["validate"]
    for source in (model, other):
        copies = {name: value.clone() for name, value in source.state_dict().items()}
        if move == "assign":
            model.load_state_dict(copies, assign=True)
            model.requires_grad_(False)
        else:
            for name, parameter in model.named_parameters():
                parameter.data = copies[name]
        assert_cached(fast)
    assert forms(fast) == 1 and report(fast).compile_seconds["validate"] == spent
    x, y = make_inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, torch.ones(2), y), other(x, torch.ones(2), y))


def test_one_graph_in_a_loop_over_models_keeps_them_apart():
    models = [make_model(SIZES, seed=seed) for seed in range(3)]
    fast = compiled(lambda x, t, y, model: model(x, t, y), full_every=3)
    x, y = make_inputs(models[0])
    with torch.no_grad():
        for time in (1.0, 0.8, 0.6):
            for model in models:
                fast(time * x, torch.full((2,), time), y, model)
        for model in models:  # a full step
            t = torch.full((2,), 0.4)
            torch.testing.assert_close(fast(0.4 * x, t, y, model), model(0.4 * x, t, y))
    assert report(fast).steps == {"full": 6, "cache": 6}


def test_arguments_with_other_strides_share_a_compiled_form():
    model = make_model(SIZES)
    fast = compiled(model, full_every=1)
    x, y = make_inputs(model)
    times = [torch.full((2,), 0.9), torch.full((1,), 0.8).expand(2), torch.full((4,), 0.7)[::2]]
    pictures = [x, x.transpose(2, 3).contiguous().transpose(2, 3)]
    with torch.no_grad():
        for t in times:
            for picture in pictures:
                torch.testing.assert_close(fast(picture, t, y), model(picture, t, y))
    assert forms(fast) == 1


class Marking(TinyDiTMoE):
    """Writes to its argument."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = super().forward(x, t, y)
        x.add_(1)
        return out


def test_an_argument_that_is_copied_and_changed_is_changed_for_the_caller():
    torch.manual_seed(0)
    model = Marking(SIZES).eval().requires_grad_(False)
    x = make_inputs(model)[0].transpose(2, 3)
    before = x.clone()
    with torch.no_grad():
        compiled(model)(x, torch.ones(2), make_inputs(model)[1])
    torch.testing.assert_close(x, before + 1)


def test_too_many_shapes_in_turn_are_spoken_of_and_all_steps_are_counted():
    fast = compiled(make_model(SIZES), max_shapes=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for turn in (1, 2):
            for batch in (2, 3, 4, 5):
                generate(fast, batch=batch)
            assert report(fast).steps == {"full": 8 * turn, "cache": 16 * turn}
    texts = [str(each.message) for each in caught if "max_shapes" in str(each.message)]
    assert len(texts) == 1 and "Raise max_shapes" in texts[0]


# Memory


def test_a_deleted_model_takes_its_graphs_and_caches_with_it():
    model = make_model(SIZES)
    fast = compiled(model, recipe="fora")
    generate(fast)
    (engine,) = engines(fast)
    (loop,) = engine.loops.values()
    (stream,) = loop.streams.held()
    tensors = list(stream.state.values())
    watched = [weakref.ref(each) for each in (model, engine, loop, *tensors)]
    assert len(tensors) > 1
    del model, fast, engine, loop, stream, tensors
    gc.collect()
    assert [each() for each in watched] == [None] * len(watched)


# What a report takes, and what is said of odd arguments


def test_a_report_and_a_reset_of_a_compiled_function():
    model = make_model(SIZES)
    fast = compiled(lambda x, t, y: model(x, t, y))
    assert report(fast).graphs == 0
    generate(fast)
    assert report(fast).steps == {"full": 2, "cache": 4}
    assert report(fast).cache_bytes > 0
    reset(fast)
    assert report(fast).cache_bytes == 0


def test_a_function_that_is_not_compiled_has_no_report():
    with pytest.raises(TypeError, match="function is not compiled"):
        report(lambda x: x)


class Timed(TinyDiTMoE):
    """Takes a timestep for each token, or one for each sample in a column."""

    def embed_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(x).flatten(2).transpose(1, 2)
        return h + sinusoidal(t.flatten(), self.sizes.width).view(len(t), -1, self.sizes.width), self.label(y)


@pytest.mark.parametrize("columns", [1, SIZES.tokens])
def test_a_timestep_for_each_token_gets_a_message_that_fits(columns):
    torch.manual_seed(0)
    model = Timed(SIZES).eval().requires_grad_(False)
    fast = compiled(model)
    x, y = make_inputs(model)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for number in range(STEPS):
            fast(x * 0.99**number, torch.full((2, columns), 1 - number / STEPS), y)
    texts = [str(each.message) for each in caught if "moeca" in str(each.message)]
    if columns == 1:
        assert texts == [] and report(fast).steps == {"full": 2, "cache": 4}
    else:
        assert len(texts) == 1 and f"only t (2, {columns}), with a number for each token" in texts[0]


def test_a_mode_has_no_effect_and_is_spoken_of_once(monkeypatch):
    replace_inductor(monkeypatch)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval().requires_grad_(False)
    fast = torch.compile(model, backend="moeca", mode="reduce-overhead")
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for batch in (2, 3):
            fast(torch.randn(batch, 4))
    texts = [str(each.message) for each in caught if "mode=" in str(each.message)]
    assert len(texts) == 1 and "mode='reduce-overhead' has no effect" in texts[0]
