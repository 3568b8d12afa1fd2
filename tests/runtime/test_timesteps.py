"""Which of two inputs is the timestep, and what is cached before that is known."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from moeca_compile.runtime.loop import StepLoop
from moeca_compile.runtime.scope import current_time, generation, step, stream
from moeca_compile.runtime.timesteps import TimestepInput, TimestepReader
from tests.harness import captured
from tests.models import SMALL, TinyDiTMoE, make_inputs
from tests.runtime.joint_models import WithGuidance, make_text


def read(times: TimestepInput, *calls: tuple[float, float]) -> list[tuple[float, ...] | None]:
    return [times.read([lambda t=t: (t,), lambda g=g: (g,)]) for t, g in calls]


def test_one_candidate_is_known_at_once():
    assert TimestepInput(1).read([lambda: (1.0, 1.0)]) == (1.0, 1.0)


def test_the_other_one_is_not_read_any_more():
    times, asked = TimestepInput(2), []
    read(times, (1.0, 3.0), (0.9, 3.0), (0.8, 3.0))
    assert times.read([lambda: (0.7,), lambda: asked.append("guidance")]) == (0.7,)
    assert not asked


@pytest.mark.parametrize("place", [0, 1])
def test_the_one_that_goes_on_while_the_other_stays(place):
    times = TimestepInput(2)
    calls = [(1 - i / 10, 3.5) if place == 0 else (3.5, 1 - i / 10) for i in range(4)]
    assert read(times, *calls) == [None, None, *((call[place],) for call in calls[2:])]


def test_repeated_calls_say_nothing():
    """Separate conditional and unconditional passes."""
    found = read(TimestepInput(2), (1.0, 3.0), (1.0, 3.0), (0.9, 3.0), (0.9, 3.0), (0.8, 3.0))
    assert found == [None] * 4 + [(0.8,)]


def test_a_later_change_of_the_other_is_no_step():
    times = TimestepInput(2)
    read(times, (1.0, 3.0), (0.9, 3.0), (0.8, 3.0))
    assert read(times, (1.0, 5.0), (0.9, 7.0)) == [(1.0,), (0.9,)]


def test_streams_with_guidance_of_their_own_are_unclear_until_they_are_named():
    times, calls = TimestepInput(2), [(1.0, 3.0), (1.0, 1.0), (0.9, 3.0), (0.9, 1.0), (0.8, 3.0), (0.8, 1.0)]
    assert read(times, *calls) == [None] * 6
    assert times.unclear == 2
    times = TimestepInput(2)
    for i, call in enumerate(calls):
        with stream("cond" if i % 2 == 0 else "uncond"):
            found = read(times, call)
    assert found == [(0.8,)]


def test_generations_are_compared_apart():
    times = TimestepInput(2)
    with generation():
        read(times, (1.0, 3.0), (0.9, 3.0))
        with generation():
            assert read(times, (1.0, 5.0), (1.0, 7.0)) == [None, None]
        assert read(times, (0.8, 3.0)) == [(0.8,)]


# --- guesses by form --------------------------------------------------------------------------------------------


def read_all(times: TimestepInput, *calls: tuple[tuple[float, ...], ...]) -> list[tuple[float, ...] | None]:
    return [times.read([lambda value=value: value for value in call]) for call in calls]


def test_a_single_number_is_taken_at_once_and_watched():
    times = TimestepInput(1, guessed=True)
    assert read_all(times, ((1.0,),), ((1.0,),), ((0.9,),)) == [(1.0,), (1.0,), (0.9,)]
    assert times.unsure == 3
    read_all(times, ((0.8,),))
    assert times.sure and times.unsure == 0


def test_labels_that_change_do_not_matter_beside_a_number():
    """Separate conditional and unconditional passes."""
    times = TimestepInput(2, guessed=True, labels={1})
    calls = [((1 - i / 10,), (label,)) for i in range(3) for label in (5, 0)]
    assert read_all(times, *calls) == [time for time, _ in calls]
    assert times.sure and not times.unclear


def test_an_integer_that_falls_twice_is_the_timestep():
    times = TimestepInput(2, guessed=True, labels={0, 1})
    calls = [((900 - i,) * 2, (3, 5)) for i in range(4)]
    assert read_all(times, *calls) == [None, None, (898, 898), (897, 897)]


@pytest.mark.parametrize(
    "labels", [[(1, 1), (2, 2), (3, 3)], [(9, 8), (7, 6), (5, 4)], [(3, 3), (1, 1), (2, 2)]], ids=str
)
def test_labels_are_no_timestep(labels):
    times = TimestepInput(1, guessed=True, labels={0})
    assert read_all(times, *((label,) for label in labels)) == [None] * 3


def test_nothing_is_sure_where_a_number_stays_and_an_integer_falls():
    """A guidance scale, and a timestep that is looked up in a table; or a label, and one step for each."""
    times = TimestepInput(2, guessed=True, labels={1})
    assert read_all(times, *(((3.5,), (900 - i,)) for i in range(4))) == [(3.5,), (3.5,), None, None]
    assert times.unclear >= 3


class Logarithm(TinyDiTMoE):
    """The time enters as log(sigma) / 4 through a linear layer."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(SMALL)
        self.time = Level(SMALL.width)


class Level(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, width)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear((t + 0.1).log()[:, None] / 4)


class Ready(Logarithm):
    """It gets the vector of the time, and not the time."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Identity()


class WithoutLabels(Ready):
    def embed_inputs(self, x, t, y):
        h, c = super().embed_inputs(x, t, torch.zeros(2, dtype=torch.long))
        return h, c + y[:, None]


def loop_of(engine) -> StepLoop:
    (loop,) = engine.loops.values()
    return loop


def steps_of(engine) -> dict[str, int]:
    """How many steps of each kind ran."""
    return {kind.name: tally.steps for kind, tally in loop_of(engine).tallies.items()}


def sampled(model, made, count=4, marked=False, by_time=lambda t: torch.full((2,), t)):
    """An engine after some steps."""
    x, y = make_inputs(model)
    graph = captured(model, x, by_time(1.0), y)
    engine = graph.engine(recipe="stack", full_every=3) if made is None else made
    for number in range(count):
        time, x = 1 - number / 10, 0.99 * x
        with step(time) if marked else nullcontext():
            engine(*graph.arguments(x=x, t=by_time(time), y=y))
    return engine


def test_a_model_without_sines_is_cached(eager_steps):
    engine = sampled(Logarithm().eval().requires_grad_(False), None)
    assert steps_of(engine) == {"full": 2, "cache": 2} and not engine.notes.warnings


def vector(time: float) -> Tensor:
    return torch.full((2, SMALL.width), time)


def test_a_model_whose_time_is_not_found_is_cached_once_its_steps_are_marked(eager_steps):
    model = WithoutLabels().eval().requires_grad_(False)
    with pytest.warns(UserWarning, match="no timestep was found .* moeca_compile.step"):
        engine = sampled(model, None, 3, by_time=vector)
    assert steps_of(engine) == {"full": 3}
    assert not loop_of(engine).compiled.caching
    sampled(model, engine, 5, marked=True, by_time=vector)
    assert loop_of(engine).compiled.caching and steps_of(engine)["cache"] > 0


def test_labels_that_stay_are_no_timestep_and_a_warning_says_what_to_do(eager_steps):
    model = Ready().eval().requires_grad_(False)
    with pytest.warns(UserWarning, match="'y', which may be the timestep, did not move .* moeca_compile.step"):
        engine = sampled(model, None, 16, by_time=vector)
    assert steps_of(engine) == {"full": 16}
    marked = sampled(model, None, 6, marked=True, by_time=vector)
    assert steps_of(marked)["cache"] > 0 and not marked.notes.warnings


@pytest.fixture(scope="module")
def guided():
    model = WithGuidance().eval().requires_grad_(False)
    noise, labels = make_inputs(model)
    return model, captured(model, noise, torch.ones(2), labels, make_text(), torch.full((2,), 3.5))


def run(guided, steps) -> tuple[list[bool], object]:
    """Whether each step's output is the model's own."""
    model, graph = guided
    engine = graph.engine(full_every=3)
    x, y = make_inputs(model)
    exact = []
    for t, g in steps:
        x = 0.99 * x
        arguments = {"x": x, "t": torch.full((2,), t), "y": y, "text": make_text(), "guidance": torch.full((2,), g)}
        (out,) = engine(*graph.arguments(**arguments))
        exact.append(bool((out - model(*arguments.values())).abs().max() < 1e-5))
    return exact, engine


def test_a_model_with_guidance_is_cached_once_its_time_is_known(guided, eager_steps):
    """Then a generation begins: two steps were full already, the third begins the interval."""
    exact, engine = run(guided, [(1 - i / 20, 3.5) for i in range(7)])
    assert exact == [True, True, True, False, False, True, False]
    exact, _ = run(guided, [(1.0, 3.5), (0.9, 3.5), (0.8, 3.5), (1.0, 5.0), (0.9, 5.0), (0.8, 5.0), (0.7, 5.0)])
    assert exact == [True] * 4 + [False, False, True]
    assert not engine.notes.warnings


def test_what_stays_unclear_is_not_cached_and_says_so(guided, eager_steps):
    with pytest.warns(UserWarning, match="'t' and 'guidance' are embedded like timesteps and change together"):
        exact, _ = run(guided, [(1 - i / 20, 3.5 + i) for i in range(6)])
    assert exact == [True] * 6


# --- timesteps marked by hand -----------------------------------------------------------------------------------


def test_a_marked_timestep_is_not_read(small_graph, small_model, eager_steps, monkeypatch):
    """As where it lies on an accelerator: the same steps, bit by bit, and no value of an input is asked for."""
    graph, (x, y), times = small_graph, make_inputs(small_model), [1 - number / 6 for number in range(6)]
    arguments = [graph.arguments(x=x * (2 + time), t=torch.full((2,), time), y=y) for time in times]
    told, marked = graph.engine(recipe="moeca-forecast"), graph.engine(recipe="moeca-forecast")
    expected = [told(*each)[0] for each in arguments]

    def refuses(*_):
        raise AssertionError("the timestep was read")

    monkeypatch.setattr(TimestepReader, "value", refuses)
    for time, each, wanted in zip(times, arguments, expected, strict=True):
        with step(time):
            assert torch.equal(marked(*each)[0], wanted)
    (loop,) = marked.loops.values()
    assert sum(tally.steps for kind, tally in loop.tallies.items() if not kind.full) == 4
    with pytest.warns(UserWarning, match="the timestep was read"):
        marked(*arguments[0])


def test_calls_at_one_marked_timestep_are_streams(graph, model, eager_steps):
    (x, y), engine = make_inputs(model), graph.engine(recipe="stack")
    for time in (1.0, 0.9, 0.8):
        with step(time):
            for label in (y, y + 1):
                engine(*graph.arguments(x=x, t=torch.ones(2), y=label))
    (loop,) = engine.loops.values()
    (at_work,) = loop.streams.requests.live.values()
    assert len(at_work.tracks) == 2 and at_work.number == 2


def test_a_mark_tells_the_timestep_from_a_guidance_scale(guided, eager_steps):
    """Of two inputs that are embedded alike, and from the first step on."""
    engine, (x, _) = guided[1].engine(recipe="stack"), make_inputs(guided[0])
    for time in (1.0, 0.9, 0.8):
        with step(time):
            x = 0.99 * x
            engine(*guided[1].arguments(x=x))
    (loop,) = engine.loops.values()
    assert {kind.name: tally.steps for kind, tally in loop.tallies.items()} == {"full": 1, "cache": 2}


def test_marks_are_left_again_and_take_finite_numbers():
    with step(3):
        assert current_time() == 3.0
        with step(2.5):
            assert current_time() == 2.5
        assert current_time() == 3.0
    assert current_time() is None
    with pytest.raises(ValueError, match="finite"), step(float("nan")):
        pass
