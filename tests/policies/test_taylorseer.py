"""TaylorSeer as its public code has it, factors of every layer kept in loops, against the recipe."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import moeca_compile
from tests.models import TinyDiTMoE, make_inputs, make_model
from tests.policies.test_held_and_extrapolated import run_blocks

pytestmark = pytest.mark.usefixtures("traced_once")
STEPS = 14
EVEN = [1 - number / STEPS for number in range(STEPS)]
UNEVEN = [1 - (number / STEPS) ** 2 for number in range(STEPS)]


class TaylorSeer:
    """The sampler's view: steps count down, the cache has factors for every layer and module."""

    def __init__(self, model: TinyDiTMoE, interval: int, order: int) -> None:
        self.model, self.interval, self.order = model, interval, order
        self.cache: dict[str, dict[int, Tensor]] = {}
        self.activated: list[int] = []
        self.counter = 0

    @torch.no_grad()
    def step(self, number: int, time: float, x: Tensor, y: Tensor) -> Tensor:
        step = STEPS - 1 - number
        full = number < 2 or self.counter == self.interval - 1
        self.counter = 0 if full else self.counter + 1
        if full:
            self.activated.append(step)
        h, c = self.model.embed_inputs(x, torch.full((len(x),), time), y)

        def value(name: str, compute) -> Tensor:
            if not full:
                return self.predicted(name, step)
            self.differentiate(name, compute())
            return self.cache[name][0]

        return self.model.finish(run_blocks(self.model, h, c, value), c)

    def differentiate(self, name: str, feature: Tensor) -> None:
        old, factors = self.cache.get(name, {}), {0: feature}
        for i in range(self.order):
            if i not in old:
                break
            factors[i + 1] = (factors[i] - old[i]) / (self.activated[-1] - self.activated[-2])
        self.cache[name] = factors

    def predicted(self, name: str, step: int) -> Tensor:
        x, output = step - self.activated[-1], torch.zeros(())
        for i, factor in self.cache[name].items():
            output = output + factor * x**i / math.factorial(i)
        return output


@pytest.mark.parametrize("times", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(("interval", "order"), [(4, 4), (2, 4), (3, 1)])
def test_a_generation_is_that_of_the_paper_s_code(model, graph, eager_steps, interval, order, times):
    reference = TaylorSeer(model, interval, order)
    engine = graph.engine(recipe="taylorseer", full_every=interval, forecast_order=order)
    x, y = make_inputs(model)
    for number, time in enumerate(times):
        (found,) = engine(*graph.arguments(x=x, t=torch.full((len(x),), time), y=y))
        expected = reference.step(number, time, x, y)
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
        x = x - found / STEPS
    assert len(reference.activated) == len(range(1, STEPS, interval)) + 1


def test_the_report_has_its_steps_and_all_layers():
    model = make_model()
    compiled = torch.compile(model, backend="moeca", options={"recipe": "taylorseer", "lowering": "eager"})
    x, y = make_inputs(model)
    with torch.no_grad():
        for time in EVEN:
            compiled(x * time, torch.full((len(x),), time), y)
    report = moeca_compile.report(compiled)
    assert report.steps == {"full": 5, "cache": 9}, "0, 1, 5, 9 and 13"
    assert {region.status for region in report.regions} == {"cached"}
    assert (report.config["forecaster"], report.config["forecast_order"]) == ("taylorseer", 4)
    assert report.flops is not None and report.flops.speedup > 2
