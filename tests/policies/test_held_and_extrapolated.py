"""FORA, stack and block caching, held or extrapolated, against a few lines of plain simulation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from examples.dit import Block, modulate
from tests.models import TinyDiTMoE, make_inputs

STEPS, EVERY = 10, 3


class Held:
    """A cached value by name, as it was at the last full step or extrapolated in time from the last two."""

    def __init__(self, forecast: bool, slope: float = 1.0) -> None:
        self.forecast, self.slope = forecast, slope
        self.full: dict[str, list[tuple[float, Tensor]]] = {}

    def __call__(self, name: str, full: bool, time: float, compute: Callable[[], Tensor]) -> Tensor:
        if full:
            self.full[name] = [*self.full.get(name, [])[-1:], (time, compute())]
        (t0, first), (t1, last) = self.full[name][0], self.full[name][-1]
        if not self.forecast or t0 == t1:
            return last
        return last + self.slope * (time - t1) / (t1 - t0) * (last - first)


@torch.no_grad()
def run_blocks(model: TinyDiTMoE, h: Tensor, c: Tensor, value: Callable[..., Tensor]) -> Tensor:
    """The model's blocks with each branch's output given by `value(name, compute)`; gates stay fresh."""
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)

        def attention(block=block, h=h, shift=shift1, scale=scale1) -> Tensor:
            return block.attn(modulate(block.norm1(h), shift, scale))

        h = h + gate1.unsqueeze(1) * value(f"attention {i}", attention)

        def feedforward(block=block, h=h, shift=shift2, scale=scale2) -> Tensor:
            return block.mlp(modulate(block.norm2(h), shift, scale))

        h = h + gate2.unsqueeze(1) * value(f"feedforward {i}", feedforward)
    return h


def simulate(model: TinyDiTMoE, held: Held, family: str, is_full: Callable[[str, int], bool]):
    """A step of the family as a function of (step number, time, picture, labels)."""

    @torch.no_grad()
    def step(number: int, time: float, x: Tensor, y: Tensor) -> Tensor:
        h, c = model.embed_inputs(x, torch.full((len(x),), time), y)
        if family == "stack":
            residual = held("stack", is_full("", number), time, lambda: run_blocks(model, h, c, lambda _, f: f()) - h)
            return model.finish(h + residual, c)
        if family == "block":
            for i in range(len(model.blocks)):

                def change(i=i, h=h) -> Tensor:
                    return model.blocks[i](h, c) - h

                h = h + (held(f"block {i}", is_full("", number), time, change) if i else change())
            return model.finish(h, c)
        h = run_blocks(model, h, c, lambda name, compute: held(name, is_full(name, number), time, compute))
        return model.finish(h, c)

    return step


def compare(model, graph, step, times, **options) -> None:
    engine = graph.engine(**options)
    x, y = make_inputs(model)
    for number, time in enumerate(times):
        (found,) = engine(*graph.arguments(x=x, t=torch.full((len(x),), time), y=y))
        expected = step(number, time, x, y)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        x = x - found / STEPS


EVEN = [1 - number / STEPS for number in range(STEPS)]
UNEVEN = [1 - (number / STEPS) ** 2 for number in range(STEPS)]


@pytest.mark.smoke
@pytest.mark.parametrize("times", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("forecast", [False, True], ids=["held", "forecast"])
@pytest.mark.parametrize("family", ["fora", "stack", "block"])
def test_every_few_steps(model, graph, eager_steps, family, forecast, times):
    step = simulate(model, Held(forecast), family, lambda name, number: number % EVERY == 0)
    compare(model, graph, step, times, recipe=family + "-forecast" * forecast, full_every=EVERY)


@pytest.mark.parametrize("recipe", ["stack-forecast", "fora-forecast"])
def test_a_part_of_the_slope(model, graph, eager_steps, recipe):
    step = simulate(model, Held(True, 0.5), recipe.split("-")[0], lambda name, number: number % EVERY == 0)
    compare(model, graph, step, UNEVEN, recipe=recipe, full_every=EVERY, forecast_slope=0.5)


@pytest.mark.parametrize("family", ["fora", "stack", "block"])
def test_an_explicit_list_of_full_steps(model, graph, eager_steps, family):
    step = simulate(model, Held(True), family, lambda name, number: number in (0, 1, 4, 8))
    compare(model, graph, step, EVEN, recipe=f"{family}-forecast", full_steps=[0, 1, 4, 8])


def test_attention_refreshed_more_often_than_experts(model, graph, eager_steps):
    step = simulate(model, Held(True), "fora", lambda name, n: n % (2 if name.startswith("attention") else 4) == 0)
    compare(model, graph, step, EVEN, recipe="fora-forecast", attention_every=2, experts_every=4)
    step = simulate(model, Held(False), "fora", lambda name, n: n % (4 if name.startswith("attention") else 2) == 0)
    compare(model, graph, step, EVEN, recipe="fora", attention_every=4, experts_every=2)


@pytest.mark.parametrize("forecast", [False, True], ids=["held", "forecast"])
def test_the_stack_is_one_part_whatever_the_intervals(model, graph, eager_steps, forecast):
    """It is refreshed where all of it is due, and extrapolated from there."""
    step = simulate(model, Held(forecast), "stack", lambda name, number: number % 4 == 0)
    recipe = "stack" + "-forecast" * forecast
    compare(model, graph, step, EVEN, recipe=recipe, attention_every=2, experts_every=4)


@pytest.mark.parametrize("recipe", ["fora", "stack", "moeca"])
def test_a_held_cache_in_half_precision_is_the_rounded_value(model, graph, eager_steps, recipe):
    """Reusing one step's values at the same input differs from the model by their rounding alone."""
    never = {"tau0": 100.0} if recipe == "moeca" else {}
    engine = graph.engine(recipe=recipe, full_every=9, cache_dtype="bfloat16", validate=False, **never)
    x, y = make_inputs(model)
    errors = []
    for time in (0.9, 0.9 - 1e-6):
        (found,) = engine(*graph.arguments(x=x, t=torch.full((len(x),), time), y=y))
        errors.append((found - model(x, torch.full((len(x),), 0.9), y)).abs().max().item())
    assert errors[0] <= 1e-5
    assert 1e-5 < errors[1] < 3e-2
