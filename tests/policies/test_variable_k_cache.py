"""Layers without a fixed number of experts a token: whole generations against the eager simulation."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.reporting.collect import COUPLED, regions_of
from tests.harness import Captured, captured
from tests.models import TinyDiTMoE, make_inputs
from tests.policies.reference_variable_k import PairSimulation
from tests.policies.test_moeca import ALL, FRESH, Generation, trajectory
from tests.policies.variable_k_models import ExpertChoice, Threshold, make_pairs_model, mark

STEPS = 9
OPTIONS: list[dict[str, Any]] = [
    {},
    {"recipe": "moeca-forecast"},
    {**FRESH, "forecast": ALL},
    {"shared": "any", "forecast": ("experts",)},
    {"shared": "any", "keys_values": "none"},
    {**FRESH, "mask_source": "previous", "forecast": ALL},
    {"entropy": "minmax", "statistic": "batch"},
    {"score_weights": "raw"},
    {"score": "drift", "tau0": 0.02},
    {"score": "staleness"},
    {"score": "staleness", "overwrite": False},
    {**FRESH, "overwrite": False, "forecast": ALL},
    {"budget": 0.25},
    {"tau0": 0.0},
    {"branches_per_token": 0.5, "forecast": ALL},
    {"branches_per_token": 0.5, "score": "staleness"},
    {"full_every": 7, "branches_per_token": 1.0},
]


@pytest.fixture(scope="module", params=[ExpertChoice, Threshold], ids=lambda router: router.__name__)
def case(request: pytest.FixtureRequest) -> tuple[TinyDiTMoE, Captured]:
    """The model with plain loops, and its graph with markers."""
    model = make_pairs_model(request.param)
    noise, labels = make_inputs(model)
    graph = captured(mark(model, True), noise, torch.ones(len(noise)), labels)
    return mark(model, False), graph


@pytest.mark.sampled(5)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_generation_is_that_of_the_simulation(case, eager_steps, options):
    model, graph = case
    generation = Generation(graph, graph.engine(**options))
    simulation = PairSimulation(model, MoecaConfig.from_options({"recipe": "moeca", **options}))
    (x, labels), ratios = make_inputs(model), []
    for number in range(STEPS):
        t = torch.full((len(x),), 1 - number / STEPS)
        step = generation.step(x=x, t=t, y=labels)
        simulation.capacity = step.kind.capacity
        expected = simulation.step(x, t, labels)
        assert ("full" if step.kind.full else "cache") == expected.kind
        assert (step.output - expected.output).abs().max() <= 1e-4 * expected.output.abs().max()
        if not step.kind.full:
            ratios.append(step.match_ratio)
            assert step.match_ratio == pytest.approx(expected.match_ratio, abs=1e-6)
            assert step.reuse_ratio == pytest.approx(expected.reuse_ratio, abs=1e-6)
        x = x - step.output / STEPS
    assert min(ratios) < 1


@pytest.mark.sampled(3)
@pytest.mark.parametrize("options", [{}, {**FRESH, "forecast": ALL}, {"branches_per_token": 0.5}], ids=str)
def test_everything_recomputed_is_the_model(case, eager_steps, monkeypatch, options):
    model, graph = case
    generation = Generation(graph, graph.engine(**options, full_every=STEPS))
    forced = StepKind(attention=False, experts=False, capacity=model.sizes.tokens, forced=True)
    choose = generation.loop.kind
    monkeypatch.setattr(generation.loop, "kind", lambda *args: kind if (kind := choose(*args)).full else forced)
    for number, arguments in enumerate(islice(trajectory(model), STEPS)):
        step = generation.step(**arguments)
        assert step.kind == (forced if number else StepKind())
        expected = model(**arguments)
        assert (step.output - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.smoke
@pytest.mark.parametrize("recipe", ["none", "moeca", "moeca-forecast", "fora", "stack"])
def test_full_steps_alone_are_the_model(case, eager_steps, recipe):
    model, graph = case
    engine = graph.engine(recipe=recipe, **({} if recipe == "none" else {"full_every": 1}))
    for arguments in islice(trajectory(model), 3):
        (output,) = engine(*graph.arguments(**arguments))
        torch.testing.assert_close(output, model(**arguments), atol=1e-5, rtol=0)


def test_the_pool_has_a_row_for_every_branch(case, eager_steps):
    _, graph = case
    loop = graph.loop(branches_per_token=1.5)
    pools = [spec for spec in loop.compiled.plan.caches if spec.name.endswith(".pool")]
    samples, tokens = loop.compiled.plan.sizes
    for spec, layer in zip(pools, loop.compiled.regions.experts, strict=True):
        assert spec.shape[0] == (layer.body.branches or 1.5 * samples * tokens)
    assert len(pools) == 2


def test_the_report_says_where_samples_are_coupled(case, eager_steps):
    _, graph = case
    loop = graph.loop()
    routers = [region for region in regions_of(loop.compiled) if region.kind == "router"]
    coupled = loop.compiled.regions.experts[0].coupled
    assert [(r.status, r.reason) for r in routers] == [("cached", COUPLED if coupled else "")] * 2
