"""The compiled policy over whole generations against the eager simulation of the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.rewrite.kinds import COUNTERS, StepKind
from moeca_compile.passes.rewrite.step_function import StepResult
from moeca_compile.runtime.engine import Engine
from tests.harness import Captured, one_in
from tests.models import TinyDiTMoE, make_inputs
from tests.policies.reference_moeca import Simulation
from tests.policies.reference_moeca import StepResult as Simulated

STEPS = 20
ALL = ("attention", "experts", "shared")
FRESH = {"keys_values": "all", "shared": "any"}  # everything that a chosen token's recomputation can refresh
OPTIONS: list[dict[str, Any]] = [
    {},
    {"recipe": "moeca-forecast"},
    {**FRESH},
    {**FRESH, "forecast": ALL},
    {"shared": "any", "forecast": ("attention",)},
    {"shared": "any", "forecast": ("experts",)},
    {"shared": "any", "forecast": ("shared",)},
    {"shared": "any", "keys_values": "chosen", "forecast": ALL},
    {"shared": "any", "keys_values": "none"},
    {**FRESH, "mask_source": "previous"},
    {**FRESH, "mask_source": "previous", "forecast": ALL},
    {"shared": "always", "keys_values": "none", "forecast": ALL},
    {"shared": "never", "keys_values": "all", "forecast": ALL},
    {"entropy": "minmax"},
    {"statistic": "batch"},
    {"score_weights": "raw"},
    {"score": "drift", "tau0": 0.02},
    {"score": "staleness"},
    {"score": "staleness", "overwrite": False},
    {**FRESH, "overwrite": False},
    {**FRESH, "overwrite": False, "forecast": ALL},
    {"budget": 0.25},
    {"budget": 0.0},
    {**FRESH, "budget": 1.0, "forecast": ALL},
    {"tau0": 0.0},
    {"tau0": 100.0},
    {"lambda1": 3.0, "lambda2": 0.1, "alpha": 0.2, "beta": 0.3},
    {**FRESH, "forecast": ALL, "forecast_order": 2, "full_every": 3},
    {"budget": 0.0, "forecast": ALL, "forecast_order": 3, "full_every": 2},
    {"full_every": 7},
    {"full_steps": (0, 1, 5, 6, 13)},
]


@dataclass(frozen=True)
class Masks:
    """What one MoE layer recomputed, as its op was told, each (B, N, k) by slot."""

    recomputed: Tensor
    weight: Tensor
    index: Tensor
    chosen: Tensor  # (B, N)


class Watch(TorchDispatchMode):
    """Keeps what `refresh_fixed_k` is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Masks] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.moeca.refresh_fixed_k.default:
            self.masks.append(_masks(*args[:6]))
        return func(*args, **(kwargs or {}))


def _masks(ring, rows, index, mask, chosen, weight) -> Masks:
    place = chosen[..., None].expand_as(mask)
    by_token = torch.zeros_like(weight, dtype=torch.bool)
    return Masks(
        by_token.scatter(1, place, mask),
        weight.clone(),
        torch.full_like(weight, -1, dtype=torch.long).scatter(1, place, index),
        by_token[..., 0].scatter(1, chosen, mask.any(-1)),
    )


@dataclass(frozen=True)
class Compiled:
    """One step of the compiled policy."""

    kind: StepKind
    output: Tensor
    masks: list[Masks]
    counts: dict[str, float]
    match_ratio: float | None
    reuse_ratio: float | None


class Generation:
    """Calls the engine step by step, telling what it did."""

    def __init__(self, graph: Captured, engine: Engine) -> None:
        self.graph, self.engine = graph, engine
        self.loop = engine.loop_for(graph.inputs)
        self.ran: list[tuple[StepKind, StepResult]] = []
        self._program = self.loop.step
        self.loop.step = self._watched  # type: ignore[method-assign]

    def _watched(self, kind: StepKind, *arguments: Any) -> Callable[..., StepResult]:
        program = self._program(kind, *arguments)

        def run(*inputs: Any) -> StepResult:
            self.ran.append((kind, program(*inputs)))
            return self.ran[-1][1]

        return run

    @torch.no_grad()
    def step(self, **arguments: Tensor) -> Compiled:
        with Watch() as watch:
            (output,) = self.engine(*self.graph.arguments(**arguments))
        kind, result = self.ran[-1]
        masks = watch.masks[-len(self.loop.compiled.regions.experts) :]  # before them come those of checks on copies
        if result.counts is None:
            return Compiled(kind, output, masks, {}, None, None)
        counts = dict(zip(COUNTERS, result.counts.sum(0).tolist(), strict=True))
        matched, recomputed = (
            counts["matched"] / counts["branches"],
            counts["recomputed"] / counts["branches"],
        )
        return Compiled(kind, output, masks, counts, matched, 1 - recomputed)


def assert_same_decisions(step: Compiled, expected: Simulated) -> None:
    if step.kind.capacity == 0:
        assert expected.recomputed_branches == 0
        return
    for masks, decision in zip(step.masks, expected.decisions.values(), strict=True):
        assert torch.equal(masks.recomputed.sum(-1), decision.recomputed_slots().sum(-1))
        torch.testing.assert_close(
            masks.weight.sort(-1).values, decision.weights.sort(-1).values, atol=1e-4, rtol=1e-4
        )
        # With a forecast, branches lie in other places than slots: those of chosen tokens are compared by expert.
        chosen, ids = masks.chosen, decision.ids
        order, wanted = masks.index[chosen].argsort(-1), ids[chosen].argsort(-1)
        assert torch.equal(masks.index[chosen].gather(-1, order), ids[chosen].gather(-1, wanted))
        for found, wanted_ in ((masks.recomputed, decision.recomputed), (masks.weight, decision.weights)):
            ours, theirs = found[chosen].gather(-1, order), wanted_[chosen].gather(-1, wanted)
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def assert_same_step(step: Compiled, expected: Simulated) -> None:
    assert ("full" if step.kind.full else "cache") == expected.kind
    scale = expected.output.abs().max()
    assert (step.output - expected.output).abs().max() <= 1e-4 * scale
    for found, wanted in (
        (step.match_ratio, expected.match_ratio),
        (step.reuse_ratio, expected.reuse_ratio),
    ):
        assert found == (None if wanted is None else pytest.approx(wanted, abs=1e-6))
    if expected.kind == "cache":
        assert_same_decisions(step, expected)


def compare(model: TinyDiTMoE, generation: Generation, simulation: Simulation) -> list[Compiled]:
    """20 Euler steps of the compiled policy, each held against the simulation on the same picture."""
    (x, labels), steps = make_inputs(model), []
    for number in range(STEPS):
        t = torch.full((len(x),), 1 - number / STEPS)
        steps.append(generation.step(x=x, t=t, y=labels))
        simulation.capacity = steps[-1].kind.capacity
        assert_same_step(steps[-1], simulation.step(x, t, labels))
        x = x - steps[-1].output / STEPS
    return steps


@pytest.mark.sampled(5)
@pytest.mark.parametrize("options", one_in(5, OPTIONS), ids=str)
def test_a_generation_is_that_of_the_simulation(model, graph, eager_steps, options):
    config = MoecaConfig.from_options({"recipe": "moeca", **options})
    steps = compare(model, Generation(graph, graph.engine(**options)), Simulation(model, config, reroute=True))
    assert sum(step.kind.full for step in steps) == len(config.full_steps or range(0, STEPS, config.full_every))
    assert any(step.match_ratio < 1 for step in steps if step.match_ratio is not None)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("capacity", [1, 5])
@pytest.mark.parametrize("options", [FRESH, {"shared": "any", "forecast": ALL}], ids=str)
def test_a_binding_capacity_drops_the_tokens_that_the_simulation_drops(model, graph, eager_steps, capacity, options):
    engine = graph.engine(**options, validate=False)
    generation = Generation(graph, engine)
    generation.loop.capacities.plan = replace(generation.loop.compiled.plan, capacities=(capacity,))
    simulation = Simulation(model, MoecaConfig(**{"recipe": "moeca", **options}), reroute=True)
    steps = compare(model, generation, simulation)
    assert {step.kind.capacity for step in steps if not step.kind.full} == {capacity}
    assert any(step.counts.get("dropped") for step in steps)


@pytest.mark.sampled(3)
@pytest.mark.smoke
@pytest.mark.parametrize(
    "recipe", ["none", "moeca", "moeca-forecast", "fora", "fora-forecast", "stack", "stack-forecast", "block"]
)
def test_full_steps_alone_are_the_model(model, graph, eager_steps, recipe):
    engine = graph.engine(recipe=recipe, **({} if recipe == "none" else {"full_every": 1}))
    for arguments in trajectory(model):
        (output,) = engine(*graph.arguments(**arguments))
        torch.testing.assert_close(output, model(**arguments), atol=1e-5, rtol=0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "options", [{}, FRESH, {**FRESH, "forecast": ALL}, {"keys_values": "none", "forecast": ALL}], ids=str
)
def test_everything_recomputed_is_the_model(model, graph, eager_steps, monkeypatch, options):
    """After the first full step all are cache steps, forced to recompute each branch and token."""
    engine = graph.engine(**options, full_every=STEPS)
    generation = Generation(graph, engine)
    forced = StepKind(attention=False, experts=False, capacity=model.sizes.tokens, forced=True)
    choose = generation.loop.kind
    monkeypatch.setattr(generation.loop, "kind", lambda *args: kind if (kind := choose(*args)).full else forced)
    for number, arguments in enumerate(trajectory(model)):
        step = generation.step(**arguments)
        assert step.kind == (forced if number else StepKind())
        expected = model(**arguments)
        assert (step.output - expected).abs().max() <= 1e-5 * expected.abs().max()


def trajectory(model: TinyDiTMoE) -> Iterator[dict[str, Tensor]]:
    """What the model is called with at each step of an uncached generation."""
    x, labels = make_inputs(model)
    for number in range(STEPS):
        arguments = {"x": x, "t": torch.full((len(x),), 1 - number / STEPS), "y": labels}
        yield arguments
        x = x - model(**arguments) / STEPS


def test_attention_and_experts_may_have_intervals_of_their_own(model, graph, eager_steps):
    generation = Generation(graph, graph.engine(attention_every=2, experts_every=3, budget=0.0))
    kinds = [generation.step(**arguments).kind for arguments in trajectory(model)]
    assert [kind.attention for kind in kinds] == [number % 2 == 0 for number in range(STEPS)]
    assert [kind.experts for kind in kinds] == [number % 3 == 0 for number in range(STEPS)]


def test_a_step_with_fresh_attention_recomputes_branches(model, graph, eager_steps):
    """Attention comes from the model itself; the router decides on it without a probe."""
    options = {**FRESH, "attention_every": 1, "full_every": STEPS, "tau0": 0.0}
    generation = Generation(graph, graph.engine(**options))
    for number, arguments in enumerate(trajectory(model)):
        step = generation.step(**arguments)
        assert step.kind == StepKind() if not number else StepKind(True, False, model.sizes.tokens)
        assert number == 0 or step.counts["recomputed"] == step.counts["branches"]
