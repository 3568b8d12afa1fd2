"""Pipelines of diffusers under `enable`: what they draw, what is counted, and that `disable` brings back all."""

from __future__ import annotations

import copy
import pickle
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moeca_compile
from moeca_compile.runtime import scope
from tests.harness import own_warnings
from tests.pipelines.tiny import (
    diffusers,
    draw,
    flux,
    flux_inputs,
    nucleus,
    nucleus_inputs,
    pixart,
    random,
    silent,
    steps_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # of schedulers' use of numpy
]
STEPS = 5
PROMPT = {"prompt": "a cat on the moon", "clean_caption": False, "use_resolution_binning": False}


# What is drawn


PIPELINES = {
    "dense, cache contexts": (flux, "stack", {**flux_inputs(guided=True), "side": 16}),
    "experts, two calls a step": (nucleus, "moeca", nucleus_inputs()),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", PIPELINES)
def test_each_picture_starts_with_a_full_step_and_full_steps_draw_what_the_pipeline_draws(case, enabled):
    make, recipe, arguments = PIPELINES[case]
    pipe = make()
    kind = type(pipe)
    plain = [draw(pipe, STEPS, seed, **arguments) for seed in range(2)]
    model = enabled(pipe, recipe, full_every=1)
    torch.testing.assert_close(draw(pipe, STEPS, **arguments), plain[0], atol=2e-6, rtol=1e-6)
    assert steps_of(model) == (2 * STEPS, 0)

    assert enabled(pipe, recipe, validate=True) is model
    for seed in range(2):
        cached = draw(pipe, STEPS, seed, **arguments)
        assert steps_of(model) == (4 * (seed + 1), 6 * (seed + 1))
        assert 0 < (cached - plain[seed]).norm() < 0.2 * plain[seed].norm()
    report = moeca_compile.report(model)
    assert own_warnings(report) == [] and report.graph_breaks == ()
    assert report.cache_bytes == 0, "the pictures are drawn"

    moeca_compile.disable(pipe)
    assert type(pipe) is kind
    assert pipe.transformer is model and "cache_context" not in vars(model) and model._compiled_call_impl is None
    assert torch.equal(draw(pipe, STEPS, **arguments), plain[0])


def test_the_default_recipe_corrects_where_the_scheduler_draws_no_noise(enabled):
    pipe = flux()
    euler, flow = pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler
    arguments = {**flux_inputs(), "side": 16}
    corrections = []
    for scheduler in (euler, flow.from_config(euler.config, stochastic_sampling=True), euler):
        pipe.scheduler = scheduler
        model = enabled(pipe, "auto")
        draw(pipe, STEPS, **arguments)
        corrections.append(moeca_compile.report(model).corrections)
    assert corrections == [1, 1, 2], "the one full step after cache steps, but for the stochastic scheduler"


def test_solvers_that_call_twice_a_step_go_back_in_time_or_repeat_a_timestep_need_no_marks(enabled):
    ancestral = diffusers.KDPM2AncestralDiscreteScheduler()
    ancestral.set_timesteps(STEPS)
    *_, last, end = ancestral.timesteps.tolist()
    solvers = {
        diffusers.HeunDiscreteScheduler(): (4, 5),
        diffusers.KDPM2DiscreteScheduler(): (3, 6),
        # It rounds the last time but one to 0 on some processors. Calls at one time are two streams of a step.
        ancestral: (4, 5) if last == end else (3, 6),
        diffusers.PNDMScheduler(skip_prk_steps=True): (3, 3),
    }
    pipe = pixart()
    plain = [draw(use(pipe, solver), STEPS, side=8, **PROMPT) for solver in solvers]
    model, before = enabled(pipe, "fora-forecast"), (0, 0)
    for (solver, expected), exact in zip(solvers.items(), plain, strict=True):
        for _ in range(2):
            cached = draw(use(pipe, solver), STEPS, side=8, **PROMPT)
            after = steps_of(model)
            assert (after[0] - before[0], after[1] - before[1]) == expected, solver
            assert (cached - exact).norm() < 0.05 * exact.norm(), solver
            before = after
    assert own_warnings(moeca_compile.report(model)) == []


def use(pipe: Any, scheduler: Any) -> Any:
    pipe.scheduler = scheduler
    return pipe


def test_from_a_picture_and_cut_short(enabled, monkeypatch):
    pipe = flux()
    model = enabled(pipe)
    draw(pipe, STEPS, side=16, **flux_inputs())
    assert steps_of(model) == (2, 3)

    from_picture = silent(diffusers.FluxImg2ImgPipeline.from_pipe(pipe))
    enabled(from_picture)
    held = []
    decode = pipe.vae.decode

    def noting_decode(*given: Any, **named: Any) -> Any:
        held.append(moeca_compile.report(model).cache_bytes)
        return decode(*given, **named)

    monkeypatch.setattr(pipe.vae, "decode", noting_decode)
    picture = random(1, 3, 16, 16, seed=3).sigmoid()
    given = {**flux_inputs(), "image": picture, "strength": 0.5, "output_type": "np"}
    draw(from_picture, 2 * STEPS, side=16, **given)
    assert steps_of(model) == (4, 6)
    assert held == [0], "caches are gone before the picture is decoded"

    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, STEPS, side=16, callback_on_step_end=stop, **flux_inputs())
    assert steps_of(model) == (5, 7)
    assert scope.current_generation() is None and moeca_compile.report(model).cache_bytes == 0
    draw(pipe, STEPS, side=16, **flux_inputs())
    assert steps_of(model) == (7, 10)


def test_two_pipelines_of_one_kind_in_turn_other_sizes_and_another_dtype(enabled):
    first, second = pixart(), pixart()
    second.transformer.proj_out.weight.data.mul_(0.5)
    models = [enabled(first), enabled(second)]
    drawn = [draw(pipe, STEPS, side=8, **PROMPT) for pipe in (first, second, first)]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert [steps_of(model) for model in models] == [(4, 6), (2, 3)]
    assert draw(first, STEPS, side=16, **PROMPT).shape[-1] == 16
    assert draw(second.to(torch.bfloat16), STEPS, side=8, **PROMPT).dtype == torch.bfloat16
    assert [steps_of(model) for model in models] == [(6, 9), (4, 6)]


# What is enabled, and is not any more


def test_the_later_options_hold_and_a_shared_denoiser_stays_compiled_while_one_pipeline_wants_it():
    first = flux()
    second, model = diffusers.FluxImg2ImgPipeline.from_pipe(first), first.transformer
    before = torch.compile(model._call_impl, backend="eager")
    model._compiled_call_impl = before
    moeca_compile.enable(first, recipe="fora", full_every=2)
    moeca_compile.enable(second, recipe="stack", full_every=4)
    compiled = model._compiled_call_impl
    moeca_compile.enable(first, recipe="stack", full_every=4)
    assert model._compiled_call_impl is compiled is not before
    assert compiled_options(model) == {"recipe": "stack", "full_every": 4}
    moeca_compile.disable(first)
    moeca_compile.disable(first)
    assert model._compiled_call_impl is compiled and type(first) is diffusers.FluxPipeline
    moeca_compile.disable(second)
    assert model._compiled_call_impl is before and type(second) is diffusers.FluxImg2ImgPipeline
    assert "cache_context" not in vars(model)


def compiled_options(model: Any) -> Any:
    from moeca_compile._torch_private import wrapper_of

    return wrapper_of(model._compiled_call_impl).kwargs["options"]


def test_a_denoiser_that_was_replaced_is_spoken_of_and_enabled_again():
    pipe, other = flux(), flux().transformer
    earlier = moeca_compile.enable(pipe, recipe="none", lowering="eager")["transformer"]
    pipe.transformer = other
    with pytest.warns(UserWarning) as told:
        draw(pipe, 1, side=16, **flux_inputs())
    (text,) = [str(each.message) for each in told if "moeca:" in str(each.message)]
    assert re.search(r"component 'transformer' of FluxPipeline was replaced .*\.enable\(pipe", text)
    moeca_compile.enable(pipe, recipe="none", lowering="eager")
    assert earlier._compiled_call_impl is None and other._compiled_call_impl is not None
    moeca_compile.disable(pipe)


def test_cache_contexts_are_streams_of_copies_and_pickles_too():
    pipe = flux()
    model = moeca_compile.enable(pipe)["transformer"]
    for each in (model, copy.deepcopy(model)):
        with each.cache_context("cond", step_index=1):
            assert scope.current_stream() == "cond"
        assert scope.current_stream() is None
    with pickle.loads(pickle.dumps(model)).cache_context("cond"):
        pass
    moeca_compile.disable(pipe)


def test_what_cannot_be_enabled_says_what_to_do_and_is_left_as_it_was():
    pipe = flux()
    with pytest.raises(moeca_compile.ConfigError, match="full_evry"):
        moeca_compile.enable(pipe, full_evry=4)
    with pytest.raises(TypeError, match=r"Linear is no diffusers pipeline.*torch\.compile\(model"):
        moeca_compile.enable(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"no denoiser .* vae \(AutoencoderKL\), text \(str\)"):
        moeca_compile.enable(SimpleNamespace(components={"vae": pipe.vae, "text": "a cat"}))
    wrapped = SimpleNamespace(components={"transformer": torch.compile(pipe.transformer, backend="eager")})
    with pytest.raises(ValueError, match=r"pipe\.transformer = pipe\.transformer\._orig_mod"):
        moeca_compile.enable(wrapped)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"pipe\.transformer\.disable_cache\(\)"):
        moeca_compile.enable(pipe)
    assert type(pipe) is diffusers.FluxPipeline and pipe.transformer._compiled_call_impl is None
    moeca_compile.disable(pipe)


def test_control_nets_and_encoders_are_no_denoisers():
    class Denoiser(torch.nn.Module):
        def forward(self, x, t, controlnet_block_samples=None): ...

    class ControlNet(torch.nn.Module):
        def forward(self, x, timestep, controlnet_cond): ...

    class Encoder(torch.nn.Module):
        def forward(self, ids): ...

    class Pipe:
        def __init__(self) -> None:
            self.components = {"a": Encoder(), "b": Denoiser(), "c": ControlNet(), "d": Denoiser(), "e": None}

        def __call__(self) -> Any:
            return scope.current_generation()

    pipe = Pipe()
    assert list(moeca_compile.enable(pipe)) == ["b", "d"]
    first, second = pipe(), pipe()
    assert first is not second and first.ended and second.ended
    moeca_compile.disable(pipe)
    assert pipe() is None
