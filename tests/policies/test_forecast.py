"""Another forecast is another rule: a parabola through three slots, against a simulation. What caches take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from moeca_compile.ops.ring import moved_to, weighted_sum
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.policies import forecast
from moeca_compile.runtime.loop import StepLoop
from tests.models import make_inputs
from tests.policies.test_held_and_extrapolated import EVEN, UNEVEN, compare, simulate


def parabola(times: Sequence[float], time: float) -> list[float]:
    """Lagrange's weights: the straight line where there are two times, the value itself where there is one."""
    return [math.prod((time - b) / (a - b) for b in times if b != a) for a in times]


@pytest.fixture
def three_slots(monkeypatch):
    """Nothing else needs to know of it."""
    monkeypatch.setattr(forecast, "RULE", forecast.Rule(3, parabola))


class Extrapolated:
    """A value by name: the polynomial through its last three full steps, as far as there are so many."""

    def __init__(self) -> None:
        self.full: dict[str, list[tuple[float, Tensor]]] = {}

    def __call__(self, name: str, full: bool, time: float, compute: Callable[[], Tensor]) -> Tensor:
        if full:
            self.full[name] = [*self.full.get(name, [])[-2:], (time, compute())]
        known, result = self.full[name], torch.zeros(())
        for i, (a, value) in enumerate(known):
            others = [b for j, (b, _) in enumerate(known) if j != i]
            result = result + math.prod((time - b) / (a - b) for b in others) * value
        return result


@pytest.mark.parametrize("times", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("family", ["fora", "stack"])
def test_a_rule_of_three_slots_is_all_that_a_second_order_needs(
    model, graph, eager_steps, three_slots, family, times
):
    step = simulate(model, Extrapolated(), family, lambda name, number: number % 2 == 0)
    compare(model, graph, step, times, recipe=f"{family}-forecast", full_every=2)


def test_parts_with_intervals_of_their_own_turn_through_their_slots(model, graph, eager_steps, three_slots):
    step = simulate(
        model, Extrapolated(), "fora", lambda name, n: n % (2 if name.startswith("attention") else 3) == 0
    )
    compare(model, graph, step, EVEN, recipe="fora-forecast", attention_every=2, experts_every=3)


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
