"""The corrector: the sum of the errors of cache steps is made up for at the next full step."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
from torch import Tensor

import moeca_compile
from moeca_compile.options import ConfigError
from moeca_compile.runtime.corrector import corrected, gain
from tests.models import SMALL, TinyDiTMoE, make_inputs, make_model

pytestmark = pytest.mark.usefixtures("traced_once")

STEPS, FULL = 9, [0, 1, 4, 8]


def euler(times: list[float], full: list[int], order: int, correct: bool) -> float:
    """A state moved by Euler steps along a velocity 3 t^order, which cache steps forecast."""
    x, known, passed = 0.0, list[tuple[float, float]](), list[float]()
    for number, (time, later) in enumerate(pairwise(times)):
        velocity = 3 * time**order
        history = known[:order]
        if history:
            nodes = [at for at, _ in history]
            shares = [prod((time - b) / (a - b) for b in nodes if b != a) for a in nodes]
            guess = sum(share * value for share, (_, value) in zip(shares, history, strict=True))
        if number in full:
            out = velocity
            if correct and passed:
                out += gain([time for time, _ in history], passed, time) * (velocity - guess)
            known, passed = [(time, velocity), *known], []
        else:
            out = guess
            passed.append(time)
        x += (later - time) * out
    return x


@pytest.mark.parametrize(("order", "full"), [(1, [0, 4, 6, 9]), (2, [0, 1, 5, 9]), (3, [0, 1, 2, 6, 9])])
@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.0, 900.0)])
def test_errors_that_grow_as_expected_are_made_up_for_exactly(order, full, ends):
    """A kept value of a line, a straight line through a parabola, and a parabola through a cubic."""
    times = torch.linspace(*ends, 11, dtype=torch.float64).tolist()
    exact = euler(times, list(range(10)), order, correct=False)
    assert euler(times, full, order, correct=True) == pytest.approx(exact, rel=1e-12)
    assert euler(times, full, order, correct=False) != pytest.approx(exact, rel=1e-3)


def test_uneven_steps_count_by_their_length():
    times = [1.0, 0.9, 0.6, 0.5, 0.4, 0.2]  # the steps before and after the full step at 0.5 are alike
    exact = euler(times, list(range(5)), 1, correct=False)
    assert euler(times, [0, 3, 4], 1, correct=True) == pytest.approx(exact, rel=1e-12)


def test_where_time_stands_still_nothing_is_corrected():
    assert gain([0.5], [], 0.4) == 0
    assert gain([0.5], [0.4], 0.4) == 0
    assert gain([0.5, 0.4], [0.45], 0.4) == 0


def test_outputs_that_are_no_floating_point_tensors_stay():
    ids = torch.tensor([1, 2])
    found, kept, nothing = corrected(
        (torch.tensor([2.0]).half(), ids, None), (torch.tensor([1.0]).half(), ids, None), 3
    )
    assert found.dtype == torch.float16 and found.item() == 5
    assert kept is ids and nothing is None


@torch.no_grad()
def outputs(model: TinyDiTMoE, compiled: object, steps: int = STEPS) -> list[Tensor]:
    """Of calls on pictures that do not depend on what the model returns."""
    x, y = make_inputs(model)
    return [
        compiled(x * (1 - number / 50), torch.full((len(x),), 1 - number / 16), y)  # type: ignore[operator]
        for number in range(steps)
    ]


def compile_with(model: TinyDiTMoE, recipe: str, full: list[int], **options: object) -> object:
    torch._dynamo.reset()
    chosen = {"recipe": recipe, "full_steps": full, "lowering": "eager", **options}
    return torch.compile(model, backend="moeca", options=chosen)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("recipe", "order"), [("stack", 0), ("stack-forecast", 1), ("moeca-forecast", 1), ("stack-forecast", 2)]
)
def test_a_full_step_returns_its_output_and_a_share_of_what_a_cache_step_would_have_missed(recipe, order):
    model, options = make_model(SMALL), {"forecast_order": order} if order else {}
    exact = outputs(model, model)
    compiled = compile_with(model, recipe, FULL, corrector=True, **options)
    found = outputs(model, compiled)
    times = [1 - number / 16 for number in range(STEPS)]
    for number in (4, 8):
        full = FULL[: FULL.index(number)]
        cached = outputs(model, compile_with(model, recipe, full, **options), number + 1)[number]
        known = [times[i] for i in reversed(full)][: 1 + order]
        weight = gain(known, times[full[-1] + 1 : number], times[number])
        assert weight > 0.5
        wanted = exact[number] + weight * (exact[number] - cached)
        assert torch.allclose(found[number], wanted, atol=1e-4 * float(wanted.abs().max()))
    assert all(torch.allclose(found[n], exact[n], atol=1e-5) for n in (0, 1))


def test_the_report_counts_corrections_and_their_work():
    model = make_model(SMALL)
    compiled, plain = (compile_with(model, "stack", FULL, corrector=on) for on in (True, False))
    outputs(model, compiled)
    report = moeca_compile.report(compiled)
    assert (report.steps, report.corrections) == ({"full": 4, "cache": 5}, 2)
    assert "2 of the full ones corrected" in str(report)
    torch._dynamo.reset()
    outputs(model, plain)
    other = moeca_compile.report(plain)
    assert other.corrections == 0
    assert report.flops.mean_step > other.flops.mean_step


def test_a_new_picture_is_not_corrected_by_the_last_one():
    model = make_model(SMALL)
    compiled = compile_with(model, "stack-forecast", FULL, corrector=True)
    first, second = outputs(model, compiled, 7), outputs(model, compiled, 1)
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("options", [{"recipe": "moeca"}, {"recipe": "fora", "attention_every": 2}], ids=str)
def test_where_it_cannot_be_computed_it_is_an_error(options):
    with pytest.raises(ConfigError, match="corrector"):
        moeca_compile.config.MoecaConfig(corrector=True, **options)
