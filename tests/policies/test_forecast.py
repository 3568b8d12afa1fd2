"""Forecasters of all orders against simulations that keep values, not weights. What caches take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from moeca_compile.config import MoecaConfig
from moeca_compile.ops.ring import moved_to, weighted_sum
from moeca_compile.options import ConfigError
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.policies.forecast import FORECASTERS, hermite_polynomial
from moeca_compile.runtime.loop import StepLoop
from tests.models import make_inputs
from tests.policies.test_held_and_extrapolated import EVEN, UNEVEN, compare, simulate

Rule = Callable[[list[tuple[float, float, Tensor]], float, float], Tensor]
"""([(number, time, value) of the full steps so far], number and time of this step) -> the forecast."""


def newton(full, number, time):
    """The polynomial through the last values, by Neville's scheme."""
    times, values = [time for _, time, _ in full], [value for *_, value in full]
    while len(values) > 1:
        gap = len(times) - len(values) + 1
        values = [
            ((time - times[i]) * values[i + 1] - (time - times[i + gap]) * values[i]) / (times[i + gap] - times[i])
            for i in range(len(values) - 1)
        ]
    return values[0]


def taylor_factors(full, order):
    """The factors that TaylorSeer's code keeps, updated full step by full step from the first on."""
    factors, last = {}, None
    for number, _, value in full:
        fresh = {0: value}
        for i in range(order):
            if i not in factors:
                break
            fresh[i + 1] = (fresh[i] - factors[i]) / (number - last)
        factors, last = fresh, number
    return factors, last


def taylorseer(order):
    def rule(full, number, time):
        factors, last = taylor_factors(full, order)
        return sum(factor * (number - last) ** i / math.factorial(i) for i, factor in factors.items())

    return rule


def hermite(order):
    """HiCache: the polynomials up to the fourth written out, contracted by sigma."""
    sigma = 1 / math.sqrt(2)

    def rule(full, number, time):
        factors, last = taylor_factors(full, order)
        z = sigma * (number - last)
        terms = [1, 2 * z, 4 * z**2 - 2, 8 * z**3 - 12 * z, 16 * z**4 - 48 * z**2 + 12]
        return sum(sigma**i * terms[i] * factor / math.factorial(i) for i, factor in factors.items())

    return rule


def adams_bashforth(full, number, time):
    """The slopes' polynomial, integrated in many small steps."""
    known = full[-1]
    slopes = [(b[1], (b[2] - a[2]) / (b[1] - a[1])) for a, b in pairwise(full)]
    if not slopes:
        return known[2]
    total, pieces = known[2].double(), 2000
    for i in range(pieces):
        at = known[1] + (time - known[1]) * (i + 0.5) / pieces
        weights = [math.prod((at - b) / (a - b) for b, _ in slopes if b != a) for a, _ in slopes]
        total = total + sum(w * s for w, (_, s) in zip(weights, slopes, strict=True)) * (time - known[1]) / pieces
    return total.float()


def chebyshev(order):
    """The ridge fit by an augmented least-squares problem, solved by numpy for all elements at once."""

    def rule(full, number, time):
        first, degree = full[0][1], min(order, len(full) - 1)
        if degree == 0:
            return full[-1][2]
        scaled = [2 * (at - first) / (time - first) - 1 for _, at, _ in full]
        basis = np.polynomial.chebyshev.chebvander(scaled, degree)
        ridge = np.diag([0.0] + [math.sqrt(0.001)] * degree)
        values = np.stack([value.double().flatten().numpy() for *_, value in full])
        wanted = np.concatenate([values, np.zeros((degree + 1, values.shape[1]))])
        found = np.linalg.lstsq(np.concatenate([basis, ridge]), wanted, rcond=None)[0]
        return torch.from_numpy(np.polynomial.chebyshev.chebval(1.0, found)).float().view(full[0][2].shape)

    return rule


class Extrapolated:
    """A value by name: forecast by a rule from its values at the last `slots` full steps."""

    def __init__(self, rule: Rule, slots: int) -> None:
        self.rule, self.slots, self.number = rule, slots, -1
        self.full: dict[str, list[tuple[float, float, Tensor]]] = {}

    def __call__(self, name: str, full: bool, time: float, compute: Callable[[], Tensor]) -> Tensor:
        if full:
            self.full[name] = [*self.full.get(name, []), (self.number, time, compute())][-self.slots :]
            return self.full[name][-1][2]
        return self.rule(self.full[name], self.number, time)


RULES = [
    ("taylor", 0, newton, 1),
    ("taylor", 2, newton, 3),
    ("taylor", 4, newton, 5),
    ("taylorseer", 1, taylorseer(1), 2),
    ("taylorseer", 4, taylorseer(4), 5),
    ("hermite", 2, hermite(2), 3),
    ("hermite", 4, hermite(4), 5),
    ("adams-bashforth", 2, adams_bashforth, 3),
    ("adams-bashforth", 4, adams_bashforth, 5),
    ("chebyshev", 1, chebyshev(1), 3),
    ("chebyshev", 2, chebyshev(2), 5),
]


def simulated(model, rule: Rule, slots: int, family: str, is_full: Callable[[str, int], bool]):
    values = Extrapolated(rule, slots)

    def noted(name: str, number: int) -> bool:
        values.number = number
        return is_full(name, number)

    return simulate(model, values, family, noted)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("times", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(("forecaster", "order", "rule", "slots"), RULES, ids=[f"{r[0]} {r[1]}" for r in RULES])
def test_every_forecaster_is_what_its_simulation_says(
    model, graph, eager_steps, forecaster, order, rule, slots, times
):
    """Full steps with gaps of 1 to 3, more of them than any rule has slots."""
    full = [0, 1, 3, 4, 7, 8]
    step = simulated(model, rule, slots, "stack", lambda name, number: number in full)
    chosen = {"forecaster": forecaster} if order else {}
    compare(model, graph, step, times, recipe="stack-forecast", full_steps=full, forecast_order=order, **chosen)


def test_parts_with_intervals_of_their_own_turn_through_their_slots(model, graph, eager_steps):
    step = simulated(model, newton, 3, "fora", lambda name, n: n % (2 if name.startswith("attention") else 3) == 0)
    options = {"recipe": "fora-forecast", "attention_every": 2, "experts_every": 3, "forecast_order": 2}
    compare(model, graph, step, EVEN, **options)


@pytest.mark.parametrize("forecaster", FORECASTERS)
@pytest.mark.parametrize("order", range(5))
def test_constant_values_stay_and_straight_lines_go_on(forecaster, order):
    """Whatever the history; but for the ridge, which bends a line."""
    rule, at = FORECASTERS[forecaster](order), [9.0, 7.0, 6.0, 3.0, 2.0, 1.0]
    for known in range(1, rule.slots + 1):
        weights = rule.weights(at[:known], 11.0)
        assert sum(weights) == pytest.approx(1.0)
        ahead = sum(weight * when for weight, when in zip(weights, at, strict=False))
        if forecaster != "chebyshev" or known == 1:
            assert ahead == pytest.approx(11.0 if order and known > 1 else 9.0)


def test_a_part_of_the_change_is_believed_to_any_order():
    at = [0.5, 0.7, 1.0]
    for forecaster in FORECASTERS:
        rule = FORECASTERS[forecaster](2)
        full, half = rule.weights(at, 0.2), replace(rule, slope=0.5).weights(at, 0.2)
        assert half == pytest.approx([(1 + full[0]) / 2, *(weight / 2 for weight in full[1:])])


def test_values_at_one_time_count_once():
    rule = FORECASTERS["taylor"](2)
    assert rule.weights([0.5, 0.5, 1.0], 0.25) == pytest.approx([1.5, 0.0, -0.5])
    assert FORECASTERS["chebyshev"](1).weights([0.5, 0.5], 0.5) == [1.0, 0.0]
    assert FORECASTERS["chebyshev"](1).weights([0.5, 1.0], 1.0)[0] == 1.0, "no time has passed since the oldest"


def test_hermite_polynomials_and_the_scale():
    x = 0.3
    known = [1, 2 * x, 4 * x**2 - 2, 8 * x**3 - 12 * x, 16 * x**4 - 48 * x**2 + 12]
    assert [hermite_polynomial(x, i) for i in range(5)] == pytest.approx(known)
    assert FORECASTERS["hermite"](1).weights([4, 0], 6) == pytest.approx([1.5, -0.5])


def test_the_options_name_all_forecasters():
    for name in FORECASTERS:
        assert MoecaConfig(recipe="stack-forecast", forecaster=name).forecaster == name
    with pytest.raises(ConfigError, match=" | ".join(map(repr, FORECASTERS)).replace("|", r"\|")):
        MoecaConfig(recipe="stack-forecast", forecaster="spline")


@pytest.mark.parametrize("recipe", ["moeca-forecast", "fora-forecast", "stack-forecast", "fora"])
def test_a_stream_never_has_more_caches_than_planned(model, graph, eager_steps, monkeypatch, recipe):
    """Counted by storage while a step's old and new values are there together; without what each step reads anew,
    which is as small as the router's output."""
    engine = graph.engine(recipe=recipe, full_every=2, validate=False)
    (loop, found) = engine.loop_for(graph.inputs), []
    step, empty = StepLoop.step, loop.streams.new_caches()

    def replaced(name: str) -> bool:
        return empty.specs[empty.slot(name)].part is not None

    def watched(self, *arguments):
        function = step(self, *arguments)

        def run(inputs, state, weights):
            result = function(inputs, state, weights)
            alive = [*state.items(), *result.updates.items()]
            storages = [t.untyped_storage() for name, t in alive if replaced(name)]
            found.append(sum({each.data_ptr(): each.nbytes() for each in storages}.values()))
            return result

        return run

    monkeypatch.setattr(StepLoop, "step", watched)
    x, y = make_inputs(model)
    for time in EVEN:
        engine(*graph.arguments(x=x, t=torch.full((len(x),), time), y=y))
    planned = sum(spec.nbytes for spec in loop.compiled.plan.caches if spec.part is not None)
    assert planned > 0.9 * loop.compiled.plan.nbytes
    assert len(found) == len(EVEN) and max(found) == planned
    assert found[0] == sum(ring[0].nbytes for ring in empty.rings.values()), "of each ring the slot that it fills"


def test_an_interrupted_step_leaves_nothing_that_counts(model, graph, eager_steps, monkeypatch):
    engine, again = (graph.engine(recipe="moeca-forecast", full_every=2, validate=False) for _ in range(2))
    x, y = make_inputs(model)

    def run(each, times):
        return [each(*graph.arguments(x=x * t, t=torch.full((len(x),), t), y=y))[0] for t in times]

    run(engine, EVEN[:4])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Caches, "store", lambda self, updates: (_ for _ in ()).throw(KeyboardInterrupt))
        run(engine, EVEN[4:5])
    for found, wanted in zip(run(engine, EVEN[4:]), run(again, EVEN[4:]), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_weighted_sums_move_as_they_are_told():
    slots, fresh = [torch.randn(4, 3) for _ in range(3)], torch.randn(4, 3)
    weights = torch.tensor([0.25, -0.5, 1.25])
    moved = moved_to(fresh, slots, weights)
    torch.testing.assert_close(weighted_sum(moved, weights), fresh)
    for one, other in ((0, 1), (1, 2)):
        torch.testing.assert_close(moved[one] - moved[other], slots[one] - slots[other])
    assert torch.equal(moved_to(fresh, slots[:1], torch.ones(1))[0], fresh)
    rubbish = [torch.full((4, 3), math.nan), slots[0]]
    assert torch.equal(weighted_sum(rubbish, torch.tensor([0.0, 1.0])), slots[0])
    assert torch.equal(moved_to(fresh, rubbish, torch.tensor([0.0, 1.0]))[1], fresh)
