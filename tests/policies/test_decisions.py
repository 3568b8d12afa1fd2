"""Recipes that decide by the data, over whole generations, against the eager simulations of the methods."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moeca_compile import generation
from moeca_compile.runtime.engine import Engine
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

STEPS = 14

CASES: list[tuple[dict[str, Any], Callable[..., Simulation]]] = [
    ({"recipe": "teacache"}, lambda model, **kw: TeaCache(model, 0.4, **kw)),
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
    ({"recipe": "block-cache", "reuse_threshold": 0.3}, lambda model, **kw: BlockCache(model, 0.3, **kw)),
    (
        {"recipe": "block-cache", "first_blocks": 2, "last_blocks": 1, "reuse_threshold": 0.4, "max_reused": 3},
        lambda model, **kw: BlockCache(model, 0.4, first=2, last=1, most=3, **kw),
    ),
    (
        {"recipe": "block-cache", "reuse_threshold": 0.5, "warmup_steps": 4, "forecast": ("stack",)},
        lambda model, **kw: BlockCache(model, 0.5, warmup=4, forecast=True, **kw),
    ),
]

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


@pytest.mark.smoke
@pytest.mark.parametrize(("options", "simulate"), CASES, ids=lambda case: str(case) if isinstance(case, dict) else "")
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
