"""One generated model, checked: one graph, the regions, exact steps, a cached generation."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile
from moeca_compile.capture.refusals import forget_refusals
from moeca_compile.config import MoecaConfig
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.reporting.found import record_of
from moeca_compile.runtime.loop import StepLoop
from tests.harness import caches_of, eager_backend
from tests.variants.blocks import Modelling, make_inputs, make_model, moving, timestep
from tests.variants.expectations import expected, regions
from tests.variants.pairs import PairLayer
from tests.variants.simulation import Simulation

STEPS = 6
UNPROVEN_THERE = r"moeca: on the inputs for validation blocks\.\d+\.mlp had the same value for all tokens"
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""Relative to the greatest magnitude; for the last two of root mean squares, since single routings flip there. In
float64 models, some routers and rotary tables are in float32, and so are the weights of a forecast."""

COARSE = {torch.bfloat16: 0.15, torch.float16: 0.1}
"""Where rounding adds up: what a generation may differ by, of root mean squares."""


@dataclass
class Outcome:
    """What a check saw: steps held against the simulation, and whether it ended early at a close decision."""

    steps: int = 0
    close: bool = False


class Compiled:
    """A model behind the real backend, its steps run without compilation."""

    def __init__(self, how: Modelling, options: dict[str, Any]) -> None:
        torch._dynamo.reset()
        forget_refusals()
        self.how, self.model = how, make_model(how)
        self.compiled = torch.compile(
            self.model, backend=eager_backend, options={"recipe": "moeca", **options, "lowering": "eager"}
        )

    @torch.no_grad()
    def step(self, x: Tensor, t: Tensor, inputs: tuple[Tensor | None, ...]) -> Tensor:
        return self.compiled(x, t, *inputs)

    @property
    def report(self) -> moeca_compile.Report:
        return moeca_compile.report(self.compiled)

    @property
    def loop(self) -> StepLoop:
        (engine,) = record_of(self.compiled).engines
        (loop,) = engine.loops.values()
        return loop


def check(how: Modelling, options: dict[str, Any]) -> Outcome:
    """Raises AssertionError where the compiled model is not what it should be."""
    compiled = Compiled(how, options)
    noise, inputs = make_inputs(how)
    empty = without_branches(compiled, noise, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        if empty:
            warnings.filterwarnings("ignore", message=UNPROVEN_THERE)
        compiled.step(noise, timestep(how, 0, STEPS), inputs)
    assert_regions(compiled, options, empty)
    if not compiled.loop.compiled.caching:
        return assert_uncached(compiled, noise, inputs)
    assert_exact(compiled, noise, inputs)
    return compare(compiled, options)


def without_branches(compiled: Compiled, noise: Tensor, inputs: tuple[Tensor | None, ...]) -> frozenset[int]:
    """Blocks whose layer takes no token of the first picture: then nothing shows there whether caching is right."""
    found: set[int] = set()

    def look(number: int, layer: PairLayer, args: tuple[Any, ...]) -> None:
        routed, _ = layer.pairs(*args[:2])
        if not routed.any():
            found.add(number)

    layers = [(number, block.mlp) for number, block in enumerate(compiled.model.blocks)]
    hooks = [
        layer.register_forward_pre_hook(partial(look, number))
        for number, layer in layers
        if isinstance(layer, PairLayer) and layer.by_the_data
    ]
    with torch.no_grad():
        if hooks:
            compiled.model(noise, timestep(compiled.how, 0, STEPS), *inputs)
    for hook in hooks:
        hook.remove()
    return frozenset(found)


def assert_regions(compiled: Compiled, options: dict[str, Any], empty: frozenset[int] = frozenset()) -> None:
    report = compiled.report
    assert (report.graphs, report.graph_breaks) == (1, ()), str(report)
    found = sorted((region.kind, region.status, region.reason) for region in report.regions)
    want = regions(compiled.how, options, empty)
    missed, surprising = Counter(want) - Counter(found), Counter(found) - Counter(want)
    assert not missed and not surprising, f"missed {dict(missed)}, surprising {dict(surprising)}\n{report}"
    told = [text for text in report.warnings if not (empty and re.match(UNPROVEN_THERE, f"moeca: {text}"))]
    assert not told and len(report.warnings) == bool(empty), str(report)


def assert_exact(compiled: Compiled, noise: Tensor, inputs: tuple[Tensor | None, ...]) -> None:
    """On changed inputs: a full step, and a cache step with everything recomputed from spoiled caches, are eager."""
    loop = compiled.loop
    with torch.no_grad():
        x, t = noise.flip(-1), timestep(compiled.how, 1, STEPS)
        want = compiled.model(x, t, *inputs)
        arguments = arguments_of(compiled, x, t, inputs)
        state, weights = caches_of(loop)
        full = loop.eager(StepKind(), arguments, state, weights)
        assert_close(output_among(full.outputs, want), want, "full")
        state.store(full.updates)
        forced = StepKind(False, False, compiled.how.tokens, forced=True)
        again = loop.eager(forced, arguments, state, weights)
        assert_close(output_among(again.outputs, want), want, "recomputed")


def output_among(outputs: Sequence[Any], want: Tensor) -> Tensor:
    """The model's output, beside what its layers leave in attributes."""
    return next(each for each in reversed(outputs) if isinstance(each, Tensor) and each.shape == want.shape)


def assert_uncached(compiled: Compiled, noise: Tensor, inputs: tuple[Tensor | None, ...]) -> Outcome:
    """Where nothing is cached, every step is the model."""
    with torch.no_grad():
        for step in range(3):
            x, t = moving(noise, step), timestep(compiled.how, step, STEPS)
            assert_close(compiled.compiled(x, t, *inputs), compiled.model(x, t, *inputs), "uncached")
    return Outcome(3)


def arguments_of(compiled: Compiled, x: Tensor, t: Tensor, inputs: tuple[Tensor | None, ...]) -> list[Any]:
    """The graph's inputs at these arguments: caught on the way in."""
    (engine,) = record_of(compiled.compiled).engines
    caught: list[Any] = []

    def catch(values: Any) -> Any:
        caught.extend(values)
        raise _CaughtError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "loop_for", catch)
        with pytest.raises(_CaughtError):
            compiled.compiled(x, t, *inputs)
    return caught


class _CaughtError(BaseException):
    pass


def assert_close(found: Tensor, want: Tensor, what: str, tolerance: float | None = None) -> None:
    assert found.dtype == want.dtype and found.shape == want.shape
    error = relative_error(found, want)
    assert error <= (tolerance or TOLERANCE[want.dtype]), f"{what}: error {error:.1e}"


def relative_error(found: Tensor, want: Tensor) -> float:
    difference, scale = (found - want).double(), want.double()
    if want.dtype in (torch.float64, torch.float32):
        return float(difference.abs().max() / scale.abs().max())
    return float(difference.square().mean().sqrt() / scale.square().mean().sqrt())


def compare(compiled: Compiled, options: dict[str, Any]) -> Outcome:
    """Euler steps of the compiled model, each held against the simulation on the same picture."""
    how, outcome = compiled.how, Outcome()
    moeca_compile.reset(compiled.compiled)
    simulation = Simulation(
        compiled.model, expected(how).understood, MoecaConfig.from_options({"recipe": "moeca", **options})
    )
    x, inputs = make_inputs(how, seed=2)
    for step in range(STEPS):
        t = timestep(how, step, STEPS)
        kind, output = watched(compiled, x, t, inputs)
        simulation.capacity = kind.capacity
        want = simulation.step(x, t, *inputs)
        if want.close:
            outcome.close = how.dtype not in COARSE
            return outcome
        assert kind.full == want.full
        assert_close(output, want.output, f"step {step}", COARSE.get(how.dtype))
        outcome.steps += 1
        x = x - output / STEPS
    return outcome


def watched(compiled: Compiled, x: Tensor, t: Tensor, inputs: tuple[Tensor | None, ...]) -> tuple[StepKind, Tensor]:
    """One step, and its kind."""
    loop, kinds = compiled.loop, []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        original = loop.tallies.add
        patch.setattr(loop.tallies, "add", lambda kind, counts: (kinds.append(kind), original(kind, counts))[1])
        output = compiled.compiled(x, t, *inputs)
    return kinds[-1], output
