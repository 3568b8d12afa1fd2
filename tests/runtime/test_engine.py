"""The callable behind one graph: whole generations, loop, threads, capacities."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.runtime.engine import Engine
from moeca_compile.runtime.scope import generation, stream
from tests.harness import Captured
from tests.models import TinyDiTMoE, make_inputs

pytestmark = pytest.mark.usefixtures("eager_steps")
STEPS = 8

Run = Callable[..., list[Tensor]]


@pytest.fixture
def run(graph: Captured, model: TinyDiTMoE) -> Run:
    """Outputs of an Euler generation from the noise of a seed."""

    def outputs(engine: Engine, seed: int = 1, times: Any = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        (x, y), results = make_inputs(model, seed=seed), []
        for time in times or [1 - number / STEPS for number in range(STEPS)]:
            t = torch.full((len(x),), time)
            results.append(engine(*graph.arguments(x=x, t=t, y=y))[0])
            x = x - results[-1] / STEPS
        return results

    return outputs


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Bit by bit."""
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"recipe": "moeca-forecast"}, {"recipe": "fora-forecast"}, {"recipe": "stack-forecast"}],
    ids=str,
)
def test_a_second_generation_equals_the_first(graph, run, options):
    engine = graph.engine(**options)
    first, other, again = run(engine, seed=1), run(engine, seed=2), run(engine, seed=1)
    assert_same(again, first)
    assert not torch.equal(other[-1], first[-1])


def test_a_cancelled_generation_leaves_nothing_behind(graph, run):
    engine = graph.engine()
    whole = run(graph.engine())
    run(engine, seed=2, times=[1.0, 0.9, 0.8])
    assert_same(run(engine), whole)


def test_reset_leaves_nothing_behind(graph, run):
    engine = graph.engine()
    whole = run(engine)
    run(engine, seed=2, times=[1.0, 0.9, 0.8])
    engine.reset()
    assert_same(run(engine), whole)


@pytest.mark.smoke
def test_separate_conditional_and_unconditional_calls_do_not_mix(graph, model):
    """Both as if each had a model of its own: their labels tell them apart."""

    def generate(engines: list[Engine]) -> list[list[Tensor]]:
        x, y = make_inputs(model)
        unconditional = torch.full_like(y, model.sizes.classes)
        results: list[list[Tensor]] = [[], []]
        for number in range(STEPS):
            t = torch.full((len(x),), 1 - number / STEPS)
            for engine, labels, outputs in zip(engines, (y, unconditional), results, strict=True):
                outputs.append(engine(*graph.arguments(x=x, t=t, y=labels))[0])
            x = x - (2 * results[0][-1] - results[1][-1]) / STEPS
        return results

    one = graph.engine()
    together = generate([one, one])
    apart = generate([graph.engine(), graph.engine()])
    for found, expected in zip(together, apart, strict=True):
        assert_same(found, expected)


@pytest.mark.smoke
def test_named_streams_keep_apart_what_comes_in_any_order(graph, model):
    x, y = make_inputs(model)
    engine, alone = graph.engine(), graph.engine()
    labels = {"cond": y, "uncond": torch.full_like(y, model.sizes.classes)}
    for number in range(6):
        t = torch.full((len(x),), 1 - number / 6)
        for name in sorted(labels, reverse=bool(number % 2)):
            with stream(name):
                (found,) = engine(*graph.arguments(x=x, t=t, y=labels[name]))
            if name == "cond":
                assert torch.equal(found, alone(*graph.arguments(x=x, t=t, y=y))[0])
        x = x * 0.99


def test_a_user_is_told_when_streams_drop_each_others_caches(graph, model):
    engine = graph.engine(recipe="stack", max_generations=1)
    (x, y), t = make_inputs(model), torch.ones(2)
    with pytest.warns(UserWarning, match=r"max_generations = 1 allows.*Raise max_generations"):
        for time in (1.0, 0.9, 0.8):
            for name in ("cond", "uncond"):
                with stream(name):
                    engine(*graph.arguments(x=x, t=t * time, y=y))


@pytest.mark.parametrize("marked", [False, True])
def test_time_may_go_back_and_forth(graph, run, marked):
    """As with churn: each step starts a little before the last one ended."""
    times = [time for step in range(10) for time in (1.05 - step / 10, 0.93 - step / 10)]
    engine = graph.engine(recipe="stack")
    with generation() if marked else contextlib.nullcontext():
        run(engine, times=times)
    assert not engine.notes.warnings
    (loop,) = engine.loops.values()
    assert any(not kind.full for kind in loop.tallies.by_kind)


@pytest.mark.smoke
def test_threads_run_generations_of_their_own(graph, run):
    engine, found = graph.engine(), {}
    run(engine, seed=3)  # everything is prepared
    barrier = threading.Barrier(2)

    def work(seed: int) -> None:
        with torch.no_grad():
            barrier.wait()
            found[seed] = run(engine, seed=seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        assert_same(found[seed], run(graph.engine(), seed=seed))


def test_inference_mode_and_no_grad_may_alternate(graph, run):
    engine, expected = graph.engine(), run(graph.engine())
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad, contextlib.nullcontext):
        with mode():
            assert_same(run(engine), expected)


@pytest.mark.smoke
def test_explicit_generations_may_be_left_and_entered_again(graph, run):
    engine, expected = graph.engine(), run(graph.engine())
    run(engine, seed=2, times=[1.0, 0.9, 0.8])
    with generation():
        assert_same(run(engine), expected)
    loop = engine.loop_for(graph.inputs)
    assert len(loop.streams.requests.live) == 1


def test_another_dtype_is_another_state(graph, run, model):
    """And its caches hold that dtype."""
    engine = graph.engine(validate=False)
    expected = run(graph.engine())
    run(engine, times=[1.0, 0.9])
    x, y = make_inputs(model)
    t = torch.full((len(x),), 0.8, dtype=torch.float64)
    # a double timestep alone: the same shapes, and yet nothing of the float calls' state
    engine(*graph.arguments(x=x, t=t, y=y))
    assert len(engine.loops) == 2
    assert list(engine.loops.values())[1].tallies.by_kind.keys() == {StepKind()}
    assert_same(run(engine), expected)


# Capacities.


def capacities(engine: Engine, graph: Captured, arguments: list[dict[str, Tensor]]) -> list[int]:
    """The capacity of each cache step."""
    loop, found = engine.loop_for(graph.inputs), []
    program = loop.step
    loop.step = lambda kind, *rest: found.append(kind) or program(kind, *rest)
    for values in arguments:
        engine(*graph.arguments(**values))
    return [kind.capacity for kind in found if not kind.full]


def still(model: TinyDiTMoE, steps: int, jump: int) -> list[dict[str, Tensor]]:
    """A picture that stays as it is until the step `jump`, then is another one."""
    (x, y), (other, _) = make_inputs(model), make_inputs(model, seed=5)
    return [
        {"x": (x if n < jump else other) * (1 + 1e-6 * n), "t": torch.full((2,), 0.9 - 1e-4 * n), "y": y}
        for n in range(steps)
    ]


def test_the_first_cache_step_finds_its_capacity(graph, model):
    """Nothing changes, and no branch exceeds so high a threshold: the smallest rung serves."""
    engine = graph.engine(tau0=100.0, full_every=4)
    assert capacities(engine, graph, still(model, 4, jump=9)) == [1, 1, 1]
    engine = graph.engine(tau0=0.0, full_every=4)
    assert capacities(engine, graph, still(model, 4, jump=9)) == [16, 16, 16]


def test_an_overflow_promotes_the_next_steps(graph, model):
    engine = graph.engine(tau0=100.0, full_every=7, capacities=(1 / 16, 1 / 4, 1.0), check_inputs=False)
    # Without the check, the second step is full: it shows the direction of time.
    found = capacities(engine, graph, still(model, 7, jump=3))
    assert found[:2] == [1, 1]  # still, then the step that overflows
    assert found[2] > 1
    assert found == sorted(found)  # never back


def test_a_capacity_is_of_its_stream_and_outlives_the_generation(graph, model):
    engine = graph.engine(tau0=0.0, full_every=4)
    loop = engine.loop_for(graph.inputs)
    calls = []
    eager = loop.eager
    loop.eager = lambda *args: calls.append(1) or eager(*args)
    arguments = still(model, 4, jump=9)
    capacities(engine, graph, arguments)
    probes = len(calls)
    capacities(engine, graph, arguments)
    assert len(calls) == probes  # the second generation knows it


def test_shapes_are_bounded(graph, model):
    engine = graph.engine(max_shapes=2, validate=False)
    x, y = make_inputs(model)
    for dtype in (torch.float32, torch.float64, torch.float16):
        engine(*graph.arguments(x=x, t=torch.ones(2, dtype=dtype), y=y))
    assert len(engine.loops) == 2
