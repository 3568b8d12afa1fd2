"""Steps run op by op until another process has compiled them. Whatever happens to that process changes no value."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir

from moeca_compile._torch_private import settings
from moeca_compile.backend import compile_graph, compile_step
from moeca_compile.config import MoecaConfig
from moeca_compile.disk import store
from moeca_compile.disk.form import NoFormError
from moeca_compile.lower import background, parts
from moeca_compile.lower.background import EarlyStep, Job, Worker, message_of
from moeca_compile.lower.parts import Parts
from moeca_compile.lower.program import CompiledStep, PartedStep, lower_parts, part_step, trace_step
from moeca_compile.notes import Notes
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.passes.rewrite.step_function import StepResult
from moeca_compile.reporting import collect
from moeca_compile.runtime.engine import Engine, Stages
from moeca_compile.runtime.record import Record
from tests import harness
from tests.harness import Captured
from tests.models import SMALL, make_inputs, make_model

TIMES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Two full steps, until the direction of time is known, then three cache steps to each full one."""
OPTIONS: dict[str, Any] = {"recipe": "fora", "full_every": 4}
CPU = torch.device("cpu")
read_from_disk = store.read


class Waiting(Worker):
    """Takes jobs, and does none until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Job] = []

    def submit(self, job: Job) -> None:
        self.taken.append(job)

    def done(self) -> None:
        for job in self.taken:
            job.over, job.compiled = True, job.parts


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch, traced_once: None) -> Waiting:
    """In place of the worker. Parts run op by op, once they are "compiled"."""
    worker = Waiting()
    monkeypatch.setattr(background, "_worker", worker)
    harness.replace_inductor(monkeypatch)
    return worker


def run(engine: Engine, calls: list[list[Any]]) -> list[Tensor]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [engine(*inputs)[0] for inputs in calls]


def kinds(engine: Engine) -> dict[str, type]:
    (loop,) = engine.loops.values()
    return {kind.name: type(step) for kind, step in {**loop.early, **loop.steps}.items()}


def assert_near(found: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def given(small_graph: Captured) -> list[list[Any]]:
    noise, labels = make_inputs(make_model(SMALL))
    return [small_graph.arguments(x=noise, t=torch.full((2,), t), y=labels) for t in TIMES]


@pytest.fixture(scope="module")
def wanted(small_graph: Captured, given: list[list[Any]]) -> list[Tensor]:
    """Of two generations, by steps that are never compiled."""
    return run(small_graph.engine(**OPTIONS, lowering="eager", disk_cache=False), [*given, *given])


def test_steps_of_both_kinds_run_early_and_give_the_same(small_graph, waiting, given, wanted):
    engine = small_graph.engine(**OPTIONS, background=True)
    found = run(engine, given)
    assert kinds(engine) == {"full": EarlyStep, "cache": EarlyStep}
    assert [job.parts for job in waiting.taken] == [4, 1]  # each kind is sent once
    assert engine.notes.parts == 0 and engine.notes.early_runs == {"full": 3, "cache": 4}
    waiting.done()
    assert_near(found + run(engine, given), wanted)
    assert kinds(engine) == {"full": CompiledStep, "cache": CompiledStep}
    assert engine.notes.parts == 5 and engine.notes.early_runs == {"full": 3, "cache": 4}
    assert {"full", "cache"} <= set(engine.notes.errors)  # they were compared with eager mode, as always


def test_code_that_is_wrong_is_found_at_the_switch_in_the_middle_of_a_generation(
    small_graph, waiting, given, wanted, monkeypatch
):
    engine = small_graph.engine(**OPTIONS, background=True)
    found = run(engine, given[:3])
    waiting.done()
    wrong = lambda gm, *_: lambda *inputs: [value + 1 for value in gm(*inputs)]  # noqa: E731
    monkeypatch.setattr(parts, "compile_graph", wrong)
    assert_near(found + run(engine, given[3:] + given), wanted)
    assert any("gives other values than eager mode" in text for text in engine.notes.warnings)
    assert engine.notes.early_runs == {"full": 2, "cache": 1}


def test_without_the_option_nothing_runs_early_and_with_it_nothing_that_was_compiled_before(
    small_graph, waiting, given, folder, monkeypatch
):
    monkeypatch.setattr(store, "read", read_from_disk)
    for asked in (False, True):
        engine = small_graph.engine(**OPTIONS, background=asked)
        run(engine, given)
        assert waiting.taken == [] and kinds(engine) == {"full": CompiledStep, "cache": CompiledStep}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO, "moeca_compile")
    return lambda: " ".join(record.getMessage() for record in caplog.records)


def test_the_log_and_the_report_say_what_ran_before_it_was_compiled(small_graph, waiting, given, said, monkeypatch):
    engine = small_graph.engine(**OPTIONS, background=True)
    engine.notes.progress.quiet = False
    run(engine, given)
    assert "full steps run op by op, until another process has compiled their 4 parts" in said()
    assert "full step handed over in" in said() and "full step compiled in" not in said()
    record = Record(engine.config, engine.notes, [engine])
    monkeypatch.setattr(collect, "record_of", lambda model: record)
    early = collect.report(make_model(SMALL))
    assert early.early_runs == {"full": 3, "cache": 4} and early.parts_beside == 0
    assert early.flops is not None
    waiting.done()
    counts = iter((0, 4, 4, 5))
    monkeypatch.setattr("moeca_compile.backend.graphs_from_disk", lambda: next(counts))
    run(engine, given)
    assert "full steps ran 3 times op by op, while another process compiled 4 parts in" in said()
    assert "full step compiled in" in said()
    found = collect.report(make_model(SMALL))
    assert (found.parts_beside, found.compiled_parts, found.from_disk["compiled parts"]) == (5, 5, 0)
    assert "compiled beside: 5 of 5 compiled parts; run before: 3 full, 4 cache" in str(found)


def test_a_model_with_ops_of_the_user_is_compiled_first(small_graph, waiting, given, said, monkeypatch):
    """Its graphs have no form."""

    def fail(*_: Any) -> Any:
        raise NoFormError("users.op is no op of torch's or ours")

    monkeypatch.setattr(background, "graph_form", fail)
    engine = small_graph.engine(**OPTIONS, background=True)
    engine.notes.progress.quiet = False
    run(engine, given[:1])
    assert waiting.taken == [] and kinds(engine) == {"full": CompiledStep}
    assert "full steps are compiled before they run: NoFormError: users.op is no op" in said()


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({}, None),
        ({"disk_cache": False}, "nothing is kept on disk"),
        ({"dump": "/tmp/dump"}, "nothing is kept on disk"),
        ({"lowering": "eager"}, "steps are not compiled"),
        ({"device": torch.device("cuda")}, "it has only been tried on a CPU"),
        ({"groups": ("ranks",)}, "other ranks take part"),
    ],
)
def test_what_is_compiled_first(folder, facts, why):
    known = {name: facts[name] for name in ("device", "groups") if name in facts}
    options = {name: value for name, value in facts.items() if name not in known}
    graph = SimpleNamespace(config=MoecaConfig(**OPTIONS, **options), **{"device": CPU, "groups": (), **known})
    assert background.why_at_once(graph) == why


def test_what_cannot_be_handed_over_is_compiled_first(waiting, said, monkeypatch):
    captured, notes = SimpleNamespace(parts=Parts()), Notes()
    graph = SimpleNamespace(config=MoecaConfig(**OPTIONS), device=CPU, groups=(), captured=captured)
    notes.progress.quiet = False
    with torch._inductor.config.patch(post_grad_custom_post_pass=lambda graph: None):
        assert background.begin(graph, StepKind(), parted(torch.ones(2)), None, notes) is None
    assert "functions of the user's take part" in said()
    monkeypatch.setattr(background, "current_settings", lambda: {"inductor": lambda: None})
    assert background.begin(graph, StepKind(), parted(torch.ones(2)), None, notes) is None
    assert "pickle" in said() and waiting.taken == []
    monkeypatch.undo()
    monkeypatch.setitem(vars(settings._FUNCTORCH), "value", None)
    with pytest.raises(LookupError):
        settings.current_settings()


def test_threads_that_call_at_once_send_a_job_once(small_graph, waiting, given, monkeypatch):
    made = list[str]()

    def slowly(compiled: Any, kind: Any, *more: Any) -> Any:
        made.append(kind.name)
        time.sleep(0.2)
        return compile_step(compiled, kind, *more)

    monkeypatch.setattr(harness.how, "stages", Stages(compile_graph, slowly))
    engine, inputs = small_graph.engine(**OPTIONS, background=True), given[0]
    barrier, found = threading.Barrier(3), list[Tensor]()

    def call() -> None:
        barrier.wait()
        with torch.no_grad():
            found.append(engine(*inputs)[0])

    threads = [threading.Thread(target=call) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert made == ["full"] and len(waiting.taken) == 1
    assert kinds(engine) == {"full": EarlyStep} and engine.notes.early_runs == {"full": 3}
    assert_near(found, 3 * [found[0]])


# --- the worker ----------------------------------------------------------------------------------------------------

LONG = 300.0
"""Seconds that a process may take to import torch and compile, where the machine is busy."""
TAKE = "import pickle, sys, time; pickle.load(sys.stdin.buffer); "


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Worker]]:
    """Workers of which each runs a script, and ends with the test."""
    monkeypatch.setattr(background, "load_inductor", lambda: True)
    made = list[Worker]()

    def make(script: str) -> Worker:
        made.append(Worker(("-S", "-c", script)))
        return made[-1]

    yield make
    for each in made:
        each.end()


def job_over(worker: Worker, message: bytes = b"N.", limit: float = 60.0) -> Job:
    """A job once it is over."""
    job, until = Job(message, 2), time.monotonic() + limit
    worker.submit(job)
    while not job.over and time.monotonic() < until:
        time.sleep(0.01)
    assert job.over
    return job


def test_one_process_does_all_jobs_and_ends_when_it_idles(worker, monkeypatch):
    answers = r"""'{"part": 1}\n{"part": 2}\n{"compiled": 2}'"""
    one = worker(f"{TAKE}print({answers}, flush=True); pickle.load(sys.stdin.buffer); print({answers}, flush=True)")
    assert job_over(one).compiled == 2
    process = one.process
    monkeypatch.setattr(background, "_IDLE", 0.1)
    assert (job_over(one).failed, one.process) == ("", process)
    process.wait(60)
    while one.process is not None:
        time.sleep(0.01)


@pytest.mark.parametrize(
    "script",
    [
        "import os; os.kill(os.getpid(), 9)",
        f"{TAKE}print('nonsense')",
        f"{TAKE}print([3])",
        f'{TAKE}print(\'{{"compiled": "many"}}\')',
        f"{TAKE}time.sleep(600)",
        "raise SystemExit(1)",
    ],
    ids=["killed", "no JSON", "another kind", "no number", "silent", "ended"],
)
def test_a_worker_that_fails_has_compiled_nothing(worker, monkeypatch, script):
    monkeypatch.setattr(background, "_SILENT", 0.5 if "sleep" in script else 60.0)
    one = worker(script)
    job = job_over(one)
    assert job.compiled == 0 and job.failed and one.process is None and not one.unfinished


def test_a_worker_that_says_why_it_cannot_do_a_job_does_the_next(worker):
    failed, compiled = """'{"failed": "no compiler"}'""", """'{"compiled": 2}'"""
    one = worker(f"{TAKE}print({failed}, flush=True); pickle.load(sys.stdin.buffer); print({compiled}, flush=True)")
    assert (job_over(one).failed, one.process is None) == ("no compiler", False)
    assert job_over(one).compiled == 2


def test_no_process_is_started_once_this_one_ends(worker):
    one = worker(f"{TAKE}")
    one.close()
    assert "ends" in job_over(one).failed and one.process is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_process_that_was_forked_does_not_keep_the_worker_from_ending(worker, monkeypatch):
    one = worker(f"""{TAKE}print('{{"compiled": 1}}', flush=True); sys.stdin.read()""")
    monkeypatch.setattr(background, "_worker", one)
    assert job_over(one).compiled == 1
    child = os.fork()
    if not child:
        time.sleep(120)
        os._exit(0)
    try:
        one.process.stdin.close()
        one.process.wait(30)  # less than the worker may idle
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_where_no_process_starts_jobs_are_over(worker, monkeypatch):
    one = worker("")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "FileNotFoundError" in job_over(one).failed


def test_in_a_process_that_was_forked_jobs_are_over(waiting):
    job = Job(b"", 1)
    background._worker.unfinished.add(job)
    background._forked()
    assert job.over and background._worker is not waiting


def parted(x: Tensor) -> PartedStep:
    def step(inputs: Any, *_: Any) -> StepResult:
        return StepResult((inputs[0].sin() * 3 + 1,), {}, None)

    return part_step(trace_step(step, [x], Caches((), CPU), torch.ones(2)), "inductor", whole=True)


def handed_over(step: PartedStep, known: Parts, all_sizes: bool) -> bytes:
    return message_of(known.missing(step.subgraphs, False), False, all_sizes, CPU)


def libraries() -> set[Path]:
    return {*Path(cache_dir()).rglob("*.so")}


def test_what_another_process_compiles_is_found_on_disk(folder, monkeypatch):
    """By a process that is really started. A tag makes Inductor's keys new."""
    one, known, x, y = Worker(), Parts(), torch.randn(3, 41), torch.randn(5, 41)
    monkeypatch.setattr(background, "load_inductor", lambda: True)
    try:
        with torch.compiler.config.patch(cache_key_tag=f"test {time.time()}"):
            job = job_over(one, handed_over(parted(x), known, False), LONG)
            assert (job.failed, job.compiled) == ("", 1)
            with torch._inductor.config.patch(max_autotune=True):
                other = handed_over(parted(x), known, False)
            assert job_over(one, other, LONG).compiled == 1  # under a setting that the worker did not have
            counters.clear()
            compiled = libraries()
            steps = [lower_parts(parted(x), known, False)]
            # With one size at hand, another is compiled for all sizes, here and there.
            job = job_over(one, handed_over(parted(y), known, True), LONG)
            assert (job.failed, job.compiled) == ("", 1)
            compiled |= libraries()
            steps.append(lower_parts(parted(y), known, True))
            assert libraries() == compiled  # nor does the C++ compiler run again
            found = counters["aot_autograd"]
            assert (found["autograd_cache_hit"], found["autograd_cache_miss"]) == (2, 0)
        assert not known.missing(parted(torch.randn(7, 41)).subgraphs, False)
        for step, value in zip(steps, (x, y), strict=True):
            torch.testing.assert_close(step([value], {}, torch.ones(2)).outputs[0], value.sin() * 3 + 1)
        monkeypatch.setattr(background, "digest", lambda form: "other sources")
        assert "not the same" in job_over(one, handed_over(parted(x), Parts(), False)).failed
    finally:
        one.end()
