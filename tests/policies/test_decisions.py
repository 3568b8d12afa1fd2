"""Recipes that decide by the data, over whole generations, against the eager simulations of the methods."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moeca_compile import generation, report
from moeca_compile.runtime.engine import Engine
from moeca_compile.runtime.late import LateCopy
from tests.harness import Captured
from tests.models import TinyDiTMoE, make_inputs
from tests.policies.reference_decisions import (
    BlockCache,
    MagCache,
    Simulation,
    TeaCache,
    time_of,
    times_of,
    trajectory_step,
)

pytestmark = pytest.mark.usefixtures("traced_once")
STEPS = 14

Case = tuple[dict[str, Any], Callable[..., Simulation]]
CASES: list[Case] = [
    (
        {"recipe": "teacache", "reuse_threshold": 0.2, "warmup_steps": 3, "max_reused": 2},
        lambda model, **kw: TeaCache(model, 0.2, warmup=3, most=2, **kw),
    ),
    (
        {"recipe": "teacache", "reuse_threshold": 0.1, "rescale": (4.0, 0.1, 0.01)},
        lambda model, **kw: TeaCache(model, 0.1, polynomial=(4.0, 0.1, 0.01), **kw),
    ),
    (
        {"recipe": "teacache", "reuse_threshold": 0.3, "forecast": ("stack",)},
        lambda model, **kw: TeaCache(model, 0.3, forecast=True, **kw),
    ),
    (
        {"recipe": "teacache", "reuse_threshold": 0.25, "corrector": True},
        lambda model, **kw: TeaCache(model, 0.25, corrector=True, **kw),
    ),
    (
        {"recipe": "block-cache", "first_blocks": 2, "last_blocks": 1, "reuse_threshold": 0.4, "max_reused": 3},
        lambda model, **kw: BlockCache(model, 0.4, first=2, last=1, most=3, **kw),
    ),
]
FURTHER: list[Case] = [  # of what those have
    ({"recipe": "teacache"}, lambda model, **kw: TeaCache(model, 0.4, **kw)),
    ({"recipe": "block-cache", "reuse_threshold": 0.3}, lambda model, **kw: BlockCache(model, 0.3, **kw)),
    (
        {"recipe": "block-cache", "reuse_threshold": 0.5, "warmup_steps": 4, "forecast": ("stack",)},
        lambda model, **kw: BlockCache(model, 0.5, warmup=4, forecast=True, **kw),
    ),
]
SMOKE, SLOW = pytest.mark.smoke, pytest.mark.slow
BOTH = [pytest.param(*case, marks=mark) for cases, mark in ((CASES, SMOKE), (FURTHER, SLOW)) for case in cases]

SIMULATED: dict[str, type[Simulation]] = {"teacache": TeaCache, "block-cache": BlockCache}


class Sampler:
    """Generations of an engine with two guidance streams, beside simulations of both on the same pictures."""

    def __init__(self, graph: Captured, engine: Engine, streams: list[Simulation]) -> None:
        self.graph, self.engine, self.streams = graph, engine, streams
        self.loop = engine.loop_for(graph.inputs)

    @torch.no_grad()
    def generate(self, seed: int, expected: int | None, steps: int = STEPS, until: int | None = None) -> list[bool]:
        """Whether each step was full, stream by stream. Every output must be that of the simulation."""
        model = self.streams[0].model
        (x, y), full = make_inputs(model, seed=seed), []
        none = torch.full_like(y, model.sizes.classes)
        for stream in self.streams:
            stream.begin(expected)
        for time in times_of(steps)[:until]:
            outputs = []
            for stream, labels in zip(self.streams, (y, none), strict=True):
                t = time_of(x, time)
                wanted_full, wanted = stream.step(x, t, labels)
                before = self.full_steps
                (found,) = self.engine(*self.graph.arguments(x=x, t=t, y=labels))
                assert (self.full_steps > before) == wanted_full, f"time {time}"
                assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
                full.append(wanted_full)
                outputs.append(found)
            x = trajectory_step(x, *outputs, steps)
        return full

    @property
    def full_steps(self) -> int:
        return sum(tally.steps for kind, tally in self.loop.tallies.items() if kind.full)


def sampler(
    graph: Captured, options: dict[str, Any], simulate: Callable[..., Simulation], model: TinyDiTMoE
) -> Sampler:
    return Sampler(graph, graph.engine(**options), [simulate(model), simulate(model)])


@pytest.mark.parametrize(("options", "simulate"), BOTH, ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_generations_are_those_of_the_simulation(model, graph, eager_steps, options, simulate):
    """Two generations, one that is canceled, and one after it: none reads what another has left."""
    each = sampler(graph, options, simulate, model)
    first = each.generate(seed=1, expected=None)
    second = each.generate(seed=2, expected=STEPS)
    canceled = each.generate(seed=3, expected=STEPS, until=5)
    each.generate(seed=4, expected=5)
    for full in (first, second):
        assert 3 < sum(full) < len(full) - 3, "decisions go both ways"
    assert second[-2:] == [True, True]
    assert not all(canceled[2:])
    assert min(min(stream.margins) for stream in each.streams) > 1e-4
    assert each.loop.tallies.probes == each.loop.tallies.steps == 2 * (3 * STEPS + 5)


@pytest.mark.smoke
def test_magcache_measures_its_ratios_in_the_first_generation_and_then_reuses(model, graph, eager_steps):
    options = {"recipe": "magcache", "reuse_threshold": 0.3}
    each = sampler(graph, options, lambda model: MagCache(model, 0.3, most=3), model)
    with pytest.warns(UserWarning, match="this generation runs uncached.*pass them as the option magnitude_ratios"):
        assert all(each.generate(seed=1, expected=None))
    for seed in (2, 3):
        full = each.generate(seed=seed, expected=STEPS)
        assert 8 < sum(full) < len(full) - 3, "decisions go both ways"
    assert min(min(stream.margins) for stream in each.streams) > 1e-4
    assert len(each.engine.notes.warnings) == 1


def test_magcache_goes_on_measuring_where_a_generation_was_canceled(model, graph, eager_steps):
    """And at other timesteps: ratios are those of two times, whatever their numbers."""
    each = sampler(graph, {"recipe": "magcache"}, lambda model: MagCache(model, 0.06, most=3), model)
    with pytest.warns(UserWarning, match="runs uncached"):
        each.generate(seed=1, expected=None, until=5)
    with pytest.warns(UserWarning, match="has not measured the magnitude ratios at these timesteps"):
        rest = each.generate(seed=2, expected=5)
    assert all(rest[10:])
    other = each.generate(seed=3, expected=5, steps=9)
    assert all(other)
    each.generate(seed=4, expected=9)


@pytest.mark.parametrize("form", ["numbers", "file"])
def test_given_ratios_are_used_from_the_first_generation_on(model, graph, eager_steps, tmp_path, recwarn, form):
    """For another number of steps the nearest ones; of a generation that turns out longer, the rest is full."""
    ratios = (1.0, 0.97, 1.05, 0.93, 1.02, 0.96, 0.94, 1.2, 1.01, 0.99)
    path = tmp_path / "ratios.json"
    path.write_text(json.dumps(ratios))
    options = {"recipe": "magcache", "magnitude_ratios": str(path) if form == "file" else ratios}
    each = sampler(graph, options, lambda model: MagCache(model, 0.06, most=3, ratios=ratios), model)
    first, second = each.generate(seed=1, expected=None), each.generate(seed=2, expected=STEPS)
    assert all(first[2 * len(ratios) :]) and not all(first[: 2 * len(ratios)])
    assert not all(second[2 * len(ratios) :])
    assert each.loop.tallies.probes == 0
    assert not [warning for warning in recwarn if "moeca" in str(warning.message)]


# The tests' own eyes


@pytest.mark.parametrize(("recipe", "simulate"), SIMULATED.items())
def test_a_decision_made_of_the_step_before_would_be_seen(model, graph, eager_steps, recipe, simulate):
    threshold = 0.3
    late = [simulate(model, threshold, late=True), simulate(model, threshold, late=True)]
    each = Sampler(graph, graph.engine(recipe=recipe, reuse_threshold=threshold), late)
    with pytest.raises(AssertionError, match="time"):
        each.generate(seed=1, expected=None)


# Whose decisions they are


@pytest.mark.parametrize("recipe", ["teacache", "block-cache"])
def test_requests_in_threads_decide_each_for_itself(model, graph, eager_steps, recipe):
    threshold = 0.3
    engine, simulate = graph.engine(recipe=recipe, reuse_threshold=threshold), SIMULATED[recipe]
    found: dict[int, list[bool]] = {}

    def run(seed: int) -> None:
        with generation(steps=STEPS):
            found[seed] = kinds_of(engine, graph, simulate(model, threshold), seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(map(tuple, found.values()))) > 1


@torch.no_grad()
def kinds_of(engine: Engine, graph: Captured, simulation: Simulation, seed: int) -> list[bool]:
    """Whether each step of a generation with one stream was full. Its outputs must be those of the simulation."""
    (x, y), full = make_inputs(simulation.model, seed=seed), []
    simulation.begin(STEPS)
    for time in times_of(STEPS):
        t = time_of(x, time)
        was_full, wanted = simulation.step(x, t, y)
        (found,) = engine(*graph.arguments(x=x, t=t, y=y))
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        full.append(was_full)
        x = x - found / STEPS
    return full


@pytest.mark.parametrize("recipe", ["teacache", "block-cache"])
def test_after_an_interrupted_step_everything_starts_anew(model, graph, eager_steps, monkeypatch, recipe):
    """The step is repeated, in full, and what had added up before is forgotten."""
    engine, simulation = graph.engine(recipe=recipe, reuse_threshold=0.3), SIMULATED[recipe](model, 0.3)
    loop, (x, y) = engine.loop_for(graph.inputs), make_inputs(model)
    simulation.begin(None)
    kinds = []
    with torch.no_grad():
        for number, time in enumerate(times_of(STEPS)):
            t, certain = time_of(x, time), number != 6
            if not certain:
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(loop, "_run", interrupted)
                    engine(*graph.arguments(x=x, t=t, y=y))
            was_full, wanted = simulation.step(x, t, y, certain)
            (found,) = engine(*graph.arguments(x=x, t=t, y=y))
            assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max(), f"step {number}"
            kinds.append(was_full)
            x = x - found / STEPS
    assert kinds[6] and not all(kinds[1:])


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


# What they cost


@pytest.mark.filterwarnings("ignore:moeca. recipe 'magcache'")
@pytest.mark.parametrize("recipe", ["teacache", "block-cache", "magcache"])
def test_the_host_asks_once_a_step_at_most_and_never_of_forced_steps(model, graph, eager_steps, monkeypatch, recipe):
    asked, number = [], LateCopy.number
    monkeypatch.setattr(LateCopy, "number", lambda copy: asked.append(1) or number(copy))
    engine = graph.engine(recipe=recipe, reuse_threshold=0.3, **({} if recipe == "magcache" else {"warmup_steps": 3}))
    counts = []
    (x, y), steps = make_inputs(model), 8
    with torch.no_grad(), generation(steps=steps):
        for time in times_of(steps):
            before = len(asked)
            engine(*graph.arguments(x=x * time, t=time_of(x, time), y=y))
            counts.append(len(asked) - before)
    # magcache only measures in a first generation.
    assert counts == ([0] * 8 if recipe == "magcache" else [0, 0, 0, 1, 1, 1, 1, 0])


@pytest.mark.smoke
@pytest.mark.parametrize("recipe", ["teacache", "block-cache"])
def test_a_report_says_what_was_decided_and_what_that_cost(model, recipe):
    """Traced, validated, and with the probe in the FLOPs."""
    torch._dynamo.reset()
    simulation = SIMULATED[recipe](model, 0.3)
    options = {"recipe": recipe, "reuse_threshold": 0.3, "lowering": "eager"}
    compiled = torch.compile(model, backend="moeca", options=options)
    simulation.begin(STEPS)
    (x, y), full = make_inputs(model), 0
    with torch.no_grad(), generation(steps=STEPS):
        for time in times_of(STEPS):
            t = time_of(x, time)
            was_full, wanted = simulation.step(x, t, y)
            found, full = compiled(x, t, y), full + was_full
            assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
            x = x - found / STEPS
    found = report(compiled)
    assert found.steps == {"full": full, "cache": STEPS - full} and found.probes == STEPS
    assert f"decided by {STEPS} probes" in str(found)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x, t, y)
    # The condition of each step is made by the probe and by the step.
    assert counter.get_total_flops() <= found.flops.full_step < 1.03 * counter.get_total_flops()
    most = STEPS / full
    assert (0.9 if recipe == "teacache" else 0.5) * most < found.flops.speedup < most
    assert found.validation_errors.keys() >= {"rewritten", "reused", "probe", "full", "cache"}
    kept = {region.name for region in found.regions if region.status == "skipped"}
    assert kept == (set() if recipe == "teacache" else {"blocks.0.attn", "blocks.0.mlp.fc2"})


def test_magcache_reports_its_ratios_which_may_be_given_to_another_model(model):
    torch._dynamo.reset()
    options = {"recipe": "magcache", "reuse_threshold": 0.3, "lowering": "eager"}
    compiled = torch.compile(model, backend="moeca", options=options)
    with pytest.warns(UserWarning, match="measures them"):
        run(compiled, model)
    second = run(compiled, model)
    ratios = report(compiled).to_dict()["magnitude_ratios"]
    assert len(ratios) == STEPS and ratios[0] == 1 and all(ratio > 0 for ratio in ratios)
    torch._dynamo.reset()
    given = torch.compile(
        model, backend="moeca", options={**options, "magnitude_ratios": json.loads(json.dumps(ratios))}
    )
    torch.testing.assert_close(run(given, model), second)
    assert report(given).steps["cache"] > 2 and report(given).magnitude_ratios == ()


@torch.no_grad()
def run(compiled: Any, model: TinyDiTMoE) -> torch.Tensor:
    x, y = make_inputs(model)
    with generation(steps=STEPS):
        for time in times_of(STEPS):
            x = x - compiled(x, time_of(x, time), y) / STEPS
    return x


def test_too_few_blocks_are_an_uncached_model_and_a_warning(graph):
    with pytest.warns(UserWarning, match="more blocks than first_blocks and last_blocks together"):
        loop = graph.loop(recipe="block-cache", first_blocks=3, last_blocks=1)
    assert not loop.compiled.caching and loop.compiled.plan.probe is None
    assert graph.loop(recipe="block-cache", first_blocks=2, last_blocks=1).compiled.caching


def test_what_a_probe_keeps_counts_as_cache(graph):
    plans = {recipe: graph.loop(recipe=recipe).compiled.plan for recipe in ("stack", "teacache", "block-cache")}
    one = plans["stack"].nbytes
    assert plans["teacache"].nbytes == 2 * one  # the input of the step before
    assert plans["block-cache"].nbytes == 4 * one  # the first change, and the streams that are handed on
    with pytest.warns(UserWarning, match="in bfloat16"):
        assert graph.loop(recipe="teacache", max_cache_bytes=2 * one - 1).compiled.config.recipe == "teacache"
