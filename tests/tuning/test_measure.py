"""Rows of candidates by a clock that the test moves: turns, medians, ratios, and what is compared with what."""

from __future__ import annotations

import math
from copy import copy
from statistics import median

import pytest
import torch

from moeca_compile.reporting.collect import report
from moeca_compile.runtime.record import _by_module
from moeca_compile.tuning import measure as module
from moeca_compile.tuning import reference as runs
from moeca_compile.tuning.measure import Candidate, Measure
from moeca_compile.tuning.reference import reference_runs
from moeca_compile.tuning.rows import Store
from tests.tuning.tiny import EAGER, loop, small

CPU = torch.device("cpu")
SEEDS, HELD_BACK = (0, 1, 2, 3), (7,)


@pytest.fixture(autouse=True)
def room_for_compilations():
    """Dynamo would give up the model's code after 8; a whole tune lets it do more."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Clock:
    """Each run of the loop takes what is next for its model: the uncached one, or a candidate."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, []
        self.seconds = {"uncached": iter((99, 8, 80, 12)), "candidate": iter((50, 2, 4, 6, 5, 40))}

    def perf_counter(self) -> float:
        return self.now


class Said:
    """In place of what shows how far it is."""

    def __init__(self) -> None:
        self.expected, self.done, self.lines = 0, 0, []

    def begin(self, what: str, runs: int) -> None:
        self.expected += runs

    def advance(self) -> None:
        self.done += 1

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def measured():
    """A row with the order of its runs."""
    model, sample, clock = small(), loop(6), Clock()
    known = reference_runs(model, sample, (*SEEDS, *HELD_BACK), SEEDS, None, CPU, lambda: None)

    def timed(compiled, seed):
        who = "uncached" if compiled is measure.__dict__.get("uncached") or not clock.order else "candidate"
        clock.order.append((who, seed))
        outputs = sample(compiled, seed)
        clock.now += next(clock.seconds[who])
        return outputs if who == "uncached" or seed in SEEDS else outputs + 1.0

    shown = Said()
    measure = Measure(
        model,
        timed,
        known,
        SEEDS,
        HELD_BACK,
        EAGER,
        lambda outputs, wanted: -float((outputs - wanted).abs().max()),
        {"calibrated": {3: (0, 2, 4)}},
        Store(None, {}),
        CPU,
        shown,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "time", clock)
        row = measure.row(Candidate("stack-forecast", "calibrated", 3))
    return measure, row, clock, shown, known


def test_turns_and_medians(measured):
    _, row, clock, shown, _ = measured
    warm = [("uncached", 0), ("candidate", 0)]
    turns = [(who, seed) for seed in SEEDS[:3] for who in ("uncached", "candidate")]
    assert clock.order == [*warm, *turns, ("candidate", 3), ("candidate", 7)]
    assert row.uncached_times == (8, 80, 12) and row.times == (2, 4, 6, 5, 40)
    assert (row.uncached_seconds, row.seconds) == (12, 5)
    assert row.speedup == median((8 / 2, 80 / 4, 12 / 6)) == 4.0, "a mean, or a ratio of medians, would differ"
    assert row.compile_seconds == 50 - 5, "compilation counts apart"
    assert shown.expected == shown.done == len(clock.order)
    assert shown.lines[0].startswith("stack-forecast, calibrated 3: 4.00 times as fast, ")


def test_quality_is_to_the_uncached_outputs_and_held_back_seeds_count_apart(measured):
    _, row, _, _, known = measured
    assert 20 < row.psnr_worst <= row.psnr < 150
    assert row.held_back_psnr == pytest.approx(20 * math.log10(known.data_range), abs=1.0), "one off everywhere"
    assert -1 < row.metric < 0 and row.held_back_metric < -0.9 and row.quality == row.metric
    assert row.held_back_quality == row.held_back_metric


def test_the_uncached_model_has_its_rounding_and_its_warnings(measured):
    measure, row, *_ = measured
    assert 60 < row.uncached_psnr <= 150 and row.warnings == measure.uncached_warnings == ()
    broken = copy(measure)
    broken.shown, broken.model, broken.sample = (
        Said(),
        Breaking().eval(),
        lambda model, seed: model(torch.ones(2) + seed),
    )
    broken.__dict__.pop("uncached")
    assert broken.uncached is not None and "the graph breaks" in broken.uncached_warnings[0]


class Breaking(torch.nn.Module):
    def forward(self, x):
        return x * x.sum().item()


def test_a_row_says_what_ran_and_where(measured):
    _, row, _, _, _ = measured
    assert row.name == "stack-forecast, calibrated 3" and row.full_steps == 3 and row.note == ""
    assert row.options["schedule"] == {"steps": 6, "full_steps": [0, 2, 4]} and row.options["corrector"]
    assert row.flops_speedup == pytest.approx(2.0, rel=0.1) and row.cache_bytes > 0
    assert row.environment["torch"] == str(torch.__version__) and row.environment["device"].startswith("CPU")
    assert row.environment["threads"] == torch.get_num_threads() and row.environment["dtype"] == "float32"


def test_a_known_row_is_not_measured_again(measured):
    measure, row, clock, _, _ = measured
    before = len(clock.order)
    assert measure.row(Candidate("stack-forecast", "calibrated", 3)) is row and len(clock.order) == before


def test_a_candidate_leaves_nothing_behind_also_where_it_fails(measured, monkeypatch):
    from moeca_compile.tuning import measure as module

    measure, kept = copy(measured[0]), []
    monkeypatch.setattr(module, "forget", lambda record, drop=module.forget: (kept.append(record), drop(record)))
    measure.sample, measure.shown = loop(6), Said()
    known = list(_by_module[measure.model])
    measure.row(Candidate("stack-forecast", "power", 2))
    (engine,) = kept[0].engines
    assert not engine.loops and engine.counted()[0].tallies.steps > 0
    assert _by_module[measure.model] == known
    measure.metric = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        measure.row(Candidate("stack-forecast", "power", 3))
    failing, runs_left = loop(6), [3]

    def sample(model, seed):
        runs_left[0] -= 1
        if not runs_left[0]:
            raise KeyError("vae")
        return failing(model, seed)

    measure.sample = sample
    with pytest.raises(KeyError):
        measure.row(Candidate("stack-forecast", "uniform", 2))
    assert _by_module[measure.model] == known and len(kept) == 3


def test_the_same_options_by_another_name_are_not_measured_again(measured):
    measure = copy(measured[0])
    measure.sample, measure.shown = loop(6), Said()
    first = measure.row(Candidate("stack-forecast", "power", 1))
    measure.sample = None
    assert measure.row(Candidate("stack-forecast", "uniform", 1)).times == first.times


@pytest.mark.parametrize(
    ("full", "spoil"), [(4, lambda x: x / 0), (5, lambda x: x[:1])], ids=["not finite", "another shape"]
)
def test_outputs_that_cannot_be_compared_are_a_note_and_end_no_tune(measured, full, spoil):
    measure, plain = copy(measured[0]), loop(6)
    measure.shown, measure.store = Said(), Store(None, {})
    uncached = measure.uncached
    measure.sample = lambda model, seed: plain(model, seed) if model is uncached else spoil(plain(model, seed))
    row = measure.row(Candidate("stack-forecast", "power", full))
    assert "not finite, or of another shape" in row.note and row.quality == row.held_back_psnr == -150


def test_a_step_that_fails_later_is_a_note(measured, monkeypatch):
    from moeca_compile.tuning import measure as module

    measure, plain, runs_done = copy(measured[0]), loop(6), []
    measure.shown, measure.store = Said(), Store(None, {})

    def sample(model, seed):
        runs_done.append(seed)
        record = module.record_of(model)
        if len(runs_done) > 4 and record is not None and record.config.recipe != "none":
            for engine in record.engines:
                monkeypatch.setattr(engine, "loop_for", lambda inputs: 1 / 0)
        return plain(model, seed)

    measure.sample = sample
    row = measure.row(Candidate("stack-forecast", "uniform", 4))
    assert row.note.startswith("a cached step failed, and the rest ran uncached: ") and "ZeroDivision" in row.note
    assert row.warnings


def test_what_caches_nothing_says_why(measured):
    measure = copy(measured[0])
    measure.shown = Said()
    measure.sample, measure.model = lambda model, seed: model(torch.ones(2, 2) * seed), torch.nn.Linear(2, 2).eval()
    measure.__dict__.pop("uncached")
    outputs = {seed: measure.model(torch.ones(2, 2) * seed).detach() for seed in (*SEEDS, *HELD_BACK)}
    measure.known = runs.Reference(outputs, 6, 6, None, None, 2.0)
    row = measure.row(Candidate("stack-forecast", "uniform", 2))
    assert "all its steps were full" in row.note


def test_error_control_is_measured_and_runs_alike_with_the_options_of_the_row(monkeypatch):
    """Each picture has its own full steps, and more than are planned where the error must be small."""
    model, sample, found = small(), loop(16), []
    known = reference_runs(model, sample, (*SEEDS, *HELD_BACK), SEEDS, None, CPU, lambda: None)
    options = {**EAGER, "max_error": 1e-4}
    measure = Measure(model, sample, known, SEEDS, HELD_BACK, options, None, {}, Store(None, {}), CPU, Said())
    monkeypatch.setattr(module, "report", lambda compiled: found.append(report(compiled)) or found[-1])
    row = measure.row(Candidate("stack-forecast", "tapered", 5))
    measure.release()
    runs = 2 + len(SEEDS)
    assert row.options["max_error"] == 1e-4 and row.full_steps == 5
    assert found[-1].steps["full"] > 6 * runs and not row.note
    torch._dynamo.reset()
    fast = torch.compile(model, backend="moeca", options=dict(row.options))
    with torch.no_grad():
        for seed in (SEEDS[0], *SEEDS, *HELD_BACK):
            sample(fast, seed)
    assert report(fast).steps == found[-1].steps
