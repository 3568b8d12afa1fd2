"""Error control: the gap to the next full step follows from the last forecast's error, as in the eager simulation."""

from __future__ import annotations

import json
import math
import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moeca_compile
from moeca_compile import Report, generation, report
from moeca_compile.config import MoecaConfig
from moeca_compile.options import ConfigError
from moeca_compile.passes.rewrite.kinds import Part
from moeca_compile.policies.criterion import StepAt
from moeca_compile.runtime.engine import Engine
from moeca_compile.runtime.error_control import ErrorControl, relative_error
from moeca_compile.runtime.late import LateCopy
from moeca_compile.runtime.schedule import EVERYTHING, Schedule
from moeca_compile.runtime.tallies import Errors
from tests.harness import Captured
from tests.models import TinyDiTMoE, make_inputs
from tests.policies.reference_error_control import Controlled

STEPS = 24
BOUND = 0.1
"""About the typical error of these models: gaps get shorter and longer."""
POWER = [round(STEPS * (1 - (1 - i / 8) ** 1.45)) for i in range(8)]
TAPERED = [round(STEPS * (1 - (1 - i / 8) ** 1.45 * (1 + 0.45 * i / 8))) for i in range(8)]
EVEN = list(range(0, STEPS, 3))
LISTED = [0, 2, 7, 9, 16, 18, 21]
STACK: dict[str, Any] = {"recipe": "stack-forecast", "full_every": 3}

CASES: dict[str, tuple[dict[str, Any], list[int], dict[str, Any]]] = {
    "power": ({**STACK, "schedule": "power", "corrector": True}, POWER, {"corrector": True}),
    "calibrated": ({**STACK, "schedule": {"steps": STEPS, "full_steps": LISTED}}, LISTED, {}),
    "even": (STACK, EVEN, {}),
    "held": ({**STACK, "recipe": "stack", "corrector": True}, EVEN, {"forecast": False, "corrector": True}),
    "auto": ({"recipe": "auto", "full_every": 3, "sampler": "deterministic"}, TAPERED, {"corrector": True}),
}
"""Options, the full steps that they plan, and the simulation."""


@pytest.fixture
def model(small_model: TinyDiTMoE) -> TinyDiTMoE:
    """What is decided about steps does not depend on what is in them."""
    return small_model


@pytest.fixture
def graph(small_graph: Captured) -> Captured:
    return small_graph


def full_steps(engine: Engine) -> int:
    loops = list(engine.loops.values())
    return sum(tally.steps for loop in loops for kind, tally in loop.tallies.items() if kind.full)


@torch.no_grad()
def generate(
    engine: Engine, graph: Captured, simulated: Controlled, planned: list[int], seed: int, until: int = STEPS
) -> list[int]:
    """The full steps of a generation. Every decision and every output must be that of the simulation."""
    (x, y), found = make_inputs(simulated.model, seed=seed), []
    simulated.begin(planned, STEPS)
    for number in range(until):
        t = torch.full((len(x),), 1 - number / STEPS)
        wanted_full, wanted = simulated.step(x, t, y)
        before = full_steps(engine)
        (out,) = engine(*graph.arguments(x=x, t=t, y=y))
        assert (full_steps(engine) > before) == wanted_full, f"step {number}"
        assert (out - wanted).abs().max() <= 1e-5 * wanted.abs().max(), f"step {number}"
        found += [number] * wanted_full
        x = x - wanted / STEPS
    return found


def gaps(full: list[int]) -> list[int]:
    return [later - now for now, later in pairwise(full)]


@pytest.mark.parametrize("case", CASES)
def test_generations_are_those_of_the_simulation(model, graph, eager_steps, case):
    """Two whole ones with one between them that is canceled: none reads what another has left."""
    options, planned, how = CASES[case]
    simulated = Controlled(model, BOUND, **how)
    engine = graph.engine(max_error=BOUND, **options)
    found = []
    for seed, until in ((1, STEPS), (2, 9), (3, STEPS)):
        with generation(steps=STEPS):
            found.append(generate(engine, graph, simulated, planned, seed, until))
    assert found[0] != found[2], "each picture has its own"
    assert all(set(full) != set(planned) for full in (found[0], found[2]))
    assert min(simulated.margins) > 1e-4
    assert len(set(gaps(found[0]))) > 1


def test_where_the_length_is_not_known_gaps_are_those_of_an_even_plan(model, graph, eager_steps):
    simulated = Controlled(model, BOUND)
    found = generate(graph.engine(max_error=BOUND, schedule="power", **STACK), graph, simulated, EVEN, seed=1)
    assert found != EVEN


@pytest.mark.parametrize(
    "fault",
    ["first sample", "last gap forgotten", "other order", "unweighted", "one step late", "unbounded", "undamped"],
)
def test_another_rule_would_be_seen(model, graph, eager_steps, fault):
    options, planned, how = CASES["power"]
    bound = 1e-4 if fault == "unbounded" else BOUND
    simulated = Controlled(model, bound, fault=fault, **how)
    engine = graph.engine(max_error=bound, **options)
    with pytest.raises(AssertionError, match="step"):
        for seed in (1, 2, 3, 4):
            with generation(steps=STEPS):
                generate(engine, graph, simulated, planned, seed)


def test_requests_in_threads_decide_each_for_itself(model, graph, eager_steps):
    engine = graph.engine(max_error=BOUND, **STACK)
    found: dict[int, list[int]] = {}
    turn = threading.Lock()

    def run(seed: int) -> None:
        simulated, (x, y) = Controlled(model, BOUND), make_inputs(model, seed=seed)
        simulated.begin(EVEN, STEPS)
        with generation(steps=STEPS), torch.no_grad():
            for number in range(STEPS):
                t = torch.full((len(x),), 1 - number / STEPS)
                wanted = simulated.step(x, t, y)[1]
                with turn:
                    (out,) = engine(*graph.arguments(x=x, t=t, y=y))
                assert (out - wanted).abs().max() <= 1e-5 * wanted.abs().max()
                x = x - wanted / STEPS
        found[seed] = simulated.fulls

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(map(tuple, found.values()))) > 1
    assert full_steps(engine) == sum(map(len, found.values()))


@torch.no_grad()
def outputs(engine: Engine, graph: Captured, model: TinyDiTMoE, told: bool | None = None) -> list[Tensor]:
    (x, y), found = make_inputs(model), []
    with generation(steps=STEPS, deterministic=told):
        for number in range(STEPS):
            found.append(engine(*graph.arguments(x=x, t=torch.full((len(x),), 1 - number / STEPS), y=y))[0])
            x = x - found[-1] / STEPS
    return found


@pytest.mark.parametrize("recipe", ["fora-forecast", "moeca-forecast", "block-forecast", "taylorseer"])
def test_other_caches_are_controlled_alike(model, graph, eager_steps, monkeypatch, recipe):
    """Bit by bit what a list of the same full steps gives; and these are not the planned ones."""
    common = {"recipe": recipe, "corrector": True, "validate": False, "full_every": 3}
    engine, full = graph.engine(max_error=0.03, **common), []
    is_full = ErrorControl.is_full
    monkeypatch.setattr(
        ErrorControl, "is_full", lambda own, at, _: is_full(own, at, _) and (full.append(at.number), True)[1]
    )
    found = outputs(engine, graph, model)
    listed = graph.engine(full_steps=(0, *full), **{**common, "full_every": 4})
    assert all(map(torch.equal, found, outputs(listed, graph, model)))
    plain = graph.engine(**common)
    outputs(plain, graph, model)
    tallies = engine.loop_for(graph.inputs).tallies
    assert full_steps(engine) == len(full) + 1 and full_steps(engine) != full_steps(plain)
    assert tallies.forecasts == len(full), "one cache step at each full step but the first"


def test_after_an_interrupted_step_the_schedule_begins_anew(model, graph, eager_steps, monkeypatch):
    engine = graph.engine(max_error=BOUND, **STACK)
    loop, (x, y) = engine.loop_for(graph.inputs), make_inputs(model)
    simulated, full = Controlled(model, BOUND), []
    simulated.begin(EVEN, STEPS)
    with torch.no_grad():
        for number in range(STEPS):
            arguments = graph.arguments(x=x, t=torch.full((len(x),), 1 - number / STEPS), y=y)
            if number == 13:
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(loop, "_run", interrupted)
                    engine(*arguments)
                simulated.begin([number, *range(number + 3, 40, 3)], 40)
                simulated.mean, simulated.number, simulated.passed = 3, number, []
            wanted_full, wanted = simulated.step(x, arguments_time(arguments, graph), y)
            before = full_steps(engine)
            (out,) = engine(*arguments)
            assert (full_steps(engine) > before) == wanted_full, f"step {number}"
            assert (out - wanted).abs().max() <= 1e-5 * wanted.abs().max(), f"step {number}"
            full += [number] * wanted_full
            x = x - wanted / STEPS
    assert 13 in full


def arguments_time(arguments: list[Any], graph: Captured) -> Tensor:
    return arguments[graph.graph.names.index("t")]


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


# When it has no say


@pytest.mark.parametrize("told", [False, True, None])
def test_a_stochastic_generation_keeps_to_the_schedule(model, graph, eager_steps, told):
    engine = graph.engine(recipe="auto", full_every=3, max_error=1e-9)
    outputs(engine, graph, model, told)
    assert (full_steps(engine) == 8) == (told is False)
    assert (engine.loop_for(graph.inputs).tallies.forecasts == 0) == (told is False)


def test_without_it_no_step_is_spent_on_errors(model, graph, eager_steps):
    engine = graph.engine(**STACK)
    outputs(engine, graph, model)
    loop = engine.loop_for(graph.inputs)
    assert loop.tallies.forecasts == 0 and loop.tallies.errors == Errors() and not loop.may_predict


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"recipe": "none"}, "recipe 'none' ignores it"),
        ({"recipe": "teacache"}, "recipe 'teacache' ignores it"),
        ({"recipe": "delta"}, "recipe 'delta' ignores it"),
        ({"recipe": "toca"}, "recipe 'toca' ignores it"),
        ({"recipe": "moeca"}, "set budget to 0"),
        ({"recipe": "stack", "full_steps": (0, 3)}, "full_steps lists the full steps"),
        ({"recipe": "fora", "attention_every": 2}, "refresh attention and experts together"),
        ({"recipe": "auto", "sampler": "stochastic"}, "for deterministic samplers"),
    ],
    ids=str,
)
def test_where_it_cannot_work_it_is_an_error(options, reason):
    with pytest.raises(ConfigError, match=f"'max_error' = 0.1.*{reason}"):
        MoecaConfig(max_error=0.1, **options)
    assert MoecaConfig(**options).max_error is None


@pytest.mark.parametrize("value", [0, -0.1, math.inf, math.nan, "0.1", True])
def test_its_value_is_checked(value):
    with pytest.raises(ConfigError, match="None or a finite number in"):
        MoecaConfig(recipe="stack", max_error=value)


# The rule by itself


def control(bound: float = 0.1, **options: Any) -> ErrorControl:
    config = MoecaConfig(**{"recipe": "stack-forecast", **options}, max_error=bound)
    return ErrorControl(config, Schedule(config, frozenset({Part.WHOLE})).full_steps)


def decided(each: ErrorControl, steps: int, errors: list[float] | None, known: bool = True) -> list[int]:
    """The full steps of a generation whose full steps find these errors in turn; None where they find none."""
    full, expected = [0], steps if known else None
    each.forced(StepAt(0, expected, 1.0))
    for number in range(1, steps):
        at = StepAt(number, expected, 1 - number / steps)
        if each.is_full(at, lambda: 0.0):
            if errors is not None:
                error = errors[len(full) % len(errors)]
                each.measured(at, lambda error=error: error)
            full.append(number)
    return full


schedules = st.one_of(
    st.builds(lambda every: {"full_every": every}, st.integers(1, 9)),
    st.builds(lambda every: {"full_every": every, "schedule": "power"}, st.integers(1, 9)),
    st.builds(lambda every, more: {"full_every": every, "warmup_steps": more}, st.integers(2, 9), st.integers(2, 6)),
    st.builds(
        lambda rest: {"schedule": {"steps": 40, "full_steps": sorted({0, *rest})}}, st.sets(st.integers(1, 39))
    ),
)


@settings(max_examples=60, deadline=None)
@given(schedules, st.integers(2, 60), st.booleans())
def test_without_errors_full_steps_are_the_planned_ones(options, steps, known):
    config = MoecaConfig(recipe="stack", **options)
    plan = Schedule(config, frozenset({Part.WHOLE}))
    expected = steps if known else None
    planned = [0]
    for number in range(1, steps):
        if plan.parts_to_refresh(planned[-1], planned[-1], number, expected).attention:
            planned.append(number)
    assert decided(control(**options), steps, None, known) == planned


@settings(max_examples=60, deadline=None)
@given(schedules, st.lists(st.sampled_from([0.0, 1e-3, 0.05, 0.1, 0.2, 3.0, math.inf, math.nan]), min_size=1))
def test_there_are_from_half_to_twice_as_many_full_steps_as_planned(options, errors):
    steps = 40
    planned = decided(control(**options), steps, None)
    found = decided(control(**options), steps, errors)
    assert math.floor(len(planned) / 2) <= len(found) <= min(steps, 2 * len(planned))
    assert set(range(options.get("warmup_steps", 0))) <= set(found)


def test_errors_at_the_bound_leave_the_schedule_and_others_scale_its_gaps():
    planned = decided(control(full_every=4), 40, None)
    assert decided(control(full_every=4), 40, [0.1]) == planned == list(range(0, 40, 4))
    # The first two gaps are planned: a straight line needs two full steps, and its error a third.
    # It asks for half the gap, 2 steps; between that and 4 is their geometric mean of 2.8, so step 10.8.
    assert decided(control(full_every=4), 40, [0.1 * 8])[:4] == [0, 4, 8, 11]
    # It asks for 8 steps, so 5.7; and for 6, so 4.9.
    assert decided(control(full_every=4), 40, [0.1 / 8])[:4] == [0, 4, 8, 14]
    assert decided(control(full_every=4), 40, [0.1 * (4 / 6) ** 3])[:4] == [0, 4, 8, 13]
    # A held value's error grows in proportion to the gap, and is known at the second full step.
    assert decided(control(recipe="stack", full_every=4), 40, [0.1 / 4])[:3] == [0, 4, 10]


def test_nan_is_a_large_error_and_none_at_all_a_small_one():
    many, few = (decided(control(full_every=4), 40, [error]) for error in (math.nan, 0.0))
    assert many == decided(control(full_every=4), 40, [math.inf]) and min(gaps(many)) == 2
    assert few == decided(control(full_every=4), 40, [1e-12]) and max(gaps(few)) == 8


def test_the_error_is_asked_for_when_the_next_step_may_be_full_and_not_before():
    each, asked = control(full_every=8), []
    each.forced(StepAt(0, 40, 1.0))
    for number in (8, 16):
        assert each.is_full(StepAt(number, 40, 0.5), lambda: 0.0)
        each.measured(StepAt(number, 40, 0.5), lambda: asked.append(0.1) or 0.1)
    for number in range(17, 22):
        assert not each.is_full(StepAt(number, 40, 0.5), lambda: 0.0) and not asked
    assert not each.is_full(StepAt(22, 40, 0.5), lambda: 0.0) and asked == [0.1]
    assert not each.is_full(StepAt(23, 40, 0.5), lambda: 0.0) and asked == [0.1]
    assert each.is_full(StepAt(24, 40, 0.5), lambda: 0.0)


def test_an_error_that_may_be_of_another_picture_is_forgotten():
    each, asked = control(full_every=8), []
    each.forced(StepAt(0, 40, 1.0))
    for number in (8, 16):
        assert each.is_full(StepAt(number, 40, 0.5), lambda: 0.0)
        each.measured(StepAt(number, 40, 0.5), lambda: asked.append(9.0) or 9.0)
    each.forget()
    each.forced(StepAt(17, 40, 0.5))
    assert [n for n in range(18, 40) if each.is_full(StepAt(n, 40, 0.5), lambda: 0.0)] == [25, 33] and not asked


def test_the_host_reads_each_error_once(model, graph, eager_steps, monkeypatch):
    asked, number = [], LateCopy.number
    monkeypatch.setattr(LateCopy, "number", lambda copy: asked.append(1) or number(copy))
    engine = graph.engine(max_error=BOUND, **STACK)
    outputs(engine, graph, model)
    # Not those of the first two full steps, nor of the last.
    assert len(asked) in (full_steps(engine) - 3, full_steps(engine) - 2)


def test_ranks_decide_by_the_largest_error(model, graph, eager_steps, monkeypatch):
    """As where another rank has found one a hundred times as large."""
    alone, joined = (graph.engine(max_error=BOUND, **STACK) for _ in range(2))
    outputs(alone, graph, model)
    ranks = joined.loop_for(graph.inputs).ranks
    monkeypatch.setattr(ranks, "most", lambda error: 100 * error)
    outputs(joined, graph, model)
    assert full_steps(joined) > full_steps(alone)


def test_where_ranks_would_not_do_the_same_no_forecast_runs(model, graph, eager_steps, monkeypatch):
    """It might exchange rows that no other rank waits for."""
    engine = graph.engine(max_error=BOUND, **STACK)
    loop = engine.loop_for(graph.inputs)
    monkeypatch.setattr(loop.ranks, "joined", True)
    monkeypatch.setattr(loop, "agreed", lambda refresh, position, stream: EVERYTHING)
    outputs(engine, graph, model)
    assert full_steps(engine) == STEPS and loop.tallies.forecasts == 0


# The error itself


def test_the_error_is_that_of_the_worst_sample():
    exact = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
    guess = torch.tensor([[3.0, 4.5], [0.0, 1.0], [1.0, 0.0]])
    assert relative_error([exact], [guess], 3).item() == pytest.approx(0.5)
    assert relative_error([exact.bfloat16()], [guess.bfloat16()], 3).dtype == torch.float32
    # Outputs count together, sample by sample; what has no samples does not count beside them.
    other = torch.tensor([[12.0], [0.0], [0.0]]), torch.tensor([[13.2], [0.0], [0.0]])
    assert relative_error([exact, other[0]], [guess, other[1]], 3).item() == pytest.approx(0.5)
    assert relative_error([exact[:1], other[0][:1]], [guess[:1], other[1][:1]], 1).item() == pytest.approx(0.1)
    loss = torch.tensor(1.0), torch.tensor(9.0)
    assert relative_error([exact, loss[0], 7], [guess, loss[1], 7], 3).item() == pytest.approx(0.5)
    assert relative_error([exact], [guess], 2).item() == pytest.approx(1.25**0.5 / 30**0.5)


def test_errors_of_nothing_and_of_no_numbers():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert relative_error([zero], [zero], 2).item() == 0
    assert relative_error([zero], [one], 2).item() == math.inf
    assert relative_error([one * math.nan], [one], 2).isnan()
    assert relative_error([torch.tensor([1, 2]), None], [torch.tensor([1, 2]), None], 2) is None


# The report


def test_a_report_says_what_was_found_and_what_that_cost(model, traced_once):
    found = {}
    for bound in (None, BOUND):
        torch._dynamo.reset()
        options = {**STACK, "lowering": "eager", "validate": False, "max_error": bound}
        compiled = torch.compile(model, backend="moeca", options=options)
        x, y = make_inputs(model)
        with torch.no_grad(), generation(steps=STEPS):
            for number in range(STEPS):
                x = x - compiled(x, torch.full((len(x),), 1 - number / STEPS), y) / STEPS
        found[bound] = report(compiled)
    plain, controlled = found[None], found[BOUND]
    errors = controlled.forecast_errors
    assert plain.forecast_errors is None and "forecast errors" not in str(plain)
    assert 0 < errors.mean <= errors.largest and 0 < errors.number < controlled.steps["full"]
    assert f"forecast errors at {errors.number} full steps: {100 * errors.mean:.1f}% on average" in str(controlled)
    again = Report.from_dict(json.loads(json.dumps(controlled.to_dict())))
    assert again.forecast_errors == errors and controlled.corrections == 0
    # A cache step at each full step but the first is counted: F full and C cache ones cost F + (C + F - 1) c.
    cheap = (plain.flops.mean_step * STEPS - 8 * plain.flops.full_step) / (STEPS - 8)
    full = controlled.steps["full"]
    spent = full * controlled.flops.full_step + (STEPS - 1) * cheap
    assert controlled.flops.mean_step * STEPS == pytest.approx(spent, rel=1e-6)
    assert moeca_compile.reporting.report.ForecastErrors is type(errors)
