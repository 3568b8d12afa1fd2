"""Each part of the benchmark in a process of its own: what dies, hangs or runs out of memory costs one row.

    run_alone(job)         one process from start to end
    run_side_by_side(jobs) as many as there are cores are made ready at a time, which is compilation; then all are
                           measured one after another, while those that wait ask nothing of the device

A job's function is a generator: it yields once, when it is ready to be measured.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from bench.gpu_sections.common import FAILED, Bench, Budget, Row, Settings

OUT_OF_MEMORY = "OutOfMemoryError"
MEASURING = 60.0
"""Most seconds that one job may take to be measured, once ready."""

ALONE = 150.0
"""Most seconds of a job that is alone on the device."""

CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Job:
    """What one process does. `function` and `settings` are pickled, so the function must be one of a module."""

    section: str
    what: str
    batch: int | str
    function: Callable[[Bench], Iterator[None]]
    settings: Settings


@dataclass(frozen=True)
class Ready:
    """The job waits to be measured."""


@dataclass(frozen=True)
class Done:
    """The job has ended; `reason` says why, if it failed."""

    reason: str = ""


class Process:
    """A running job: what it sends, and its end, whatever that is.

    `seconds` are those of the whole benchmark, `ready_in` those until it must be ready.
    """

    def __init__(self, job: Job, folder: str, seconds: float, ready_in: float) -> None:
        context = get_context("spawn")  # CUDA does not survive a fork
        self.job, self.ready = job, False
        self.done: Done | None = None
        self.deadline = time.monotonic() + ready_in
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_child, args=(theirs, job, folder, seconds))
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def go(self, seconds: float) -> None:
        """Let it be measured, within so many seconds."""
        self.deadline = time.monotonic() + seconds
        with suppress(OSError):  # it died since; its pipe says so next
            self.pipe.send(None)

    def receive(self, emit: Callable[[Row], None]) -> None:
        """Handle one message; call it when there is one."""
        try:
            message = self.pipe.recv()
        except EOFError:
            self.process.join()
            message = Done(f"the process died, exit code {self.process.exitcode}")
        if isinstance(message, Row):
            emit(message)
        elif isinstance(message, Ready):
            self.ready = True
        else:
            self.done = message
            self.process.join(10)
            self.kill()

    def kill(self, reason: str = "") -> None:
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.done = self.done or Done(reason)


def run_alone(job: Job, budget: Budget, emit: Callable[[Row], None], seconds: float = ALONE) -> None:
    """Run one job from start to end, for so many seconds at most."""
    (failed,) = _run([job], budget, emit, seconds, max(seconds, MEASURING))
    _report(job, failed, emit)


def run_side_by_side(jobs: Sequence[Job], budget: Budget, emit: Callable[[Row], None], ready_in: float) -> None:
    """Make all jobs ready within so many seconds, then measure them in order.

    Together they may need more memory than there is: what failed for want of it runs once more, alone.
    """
    reasons = _run(jobs, budget, emit, ready_in)
    for job, reason in zip(jobs, reasons, strict=True):
        if OUT_OF_MEMORY in reason and len(jobs) > 1:
            if budget.allows(f"{job.section}: {job.what} alone, since memory did not do for all", 30):
                run_alone(job, budget, emit, ready_in)
        else:
            _report(job, reason, emit)


def _run(
    jobs: Sequence[Job], budget: Budget, emit: Callable[[Row], None], ready_in: float, measuring: float = MEASURING
) -> list[str]:
    """Why each job failed; "" where it did not."""
    running: list[Process] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            _make_ready(jobs, running, folder, budget, emit, ready_in)
            for one in running:
                if one.done is None:
                    one.go(min(measuring, max(budget.left, 1.0)))
                    while one.done is None:
                        _receive([one], emit)
        finally:
            for one in running:
                one.kill("the benchmark ended before it")
    return [one.done.reason if one.done else "" for one in running]


def _make_ready(
    jobs: Sequence[Job],
    running: list[Process],
    folder: str,
    budget: Budget,
    emit: Callable[[Row], None],
    ready_in: float,
) -> None:
    """Start all jobs, no more of them at work at a time than there are cores, until each is ready or has ended."""
    while True:
        busy = [one for one in running if one.done is None and not one.ready]
        while len(running) < len(jobs) and len(busy) < CORES:
            seconds = min(ready_in, max(budget.left, 0.0))
            busy.append(Process(jobs[len(running)], str(Path(folder) / str(len(running))), budget.left, seconds))
            running.append(busy[-1])
        if not busy:
            return
        _receive(busy, emit)


def _receive(running: Sequence[Process], emit: Callable[[Row], None]) -> None:
    """Wait for one or more messages. Kills what is late instead."""
    first = min(one.deadline for one in running)
    heard = wait([one.pipe for one in running], max(0.0, first - time.monotonic()))
    for one in running:
        if one.pipe in heard:
            one.receive(emit)
        elif time.monotonic() >= one.deadline:
            one.kill(f"{'not measured' if one.ready else 'not ready'} in time, killed")


def _report(job: Job, reason: str, emit: Callable[[Row], None]) -> None:
    if reason:
        emit(Row(job.section, job.what, math.nan, "", job.batch, note=f"{FAILED} {reason}"[:200]))


# --- in the process -------------------------------------------------------------------------------------------


def _child(pipe: Connection, job: Job, folder: str, seconds: float) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # each compiles cold, and none waits for the lock of another
    reason = ""
    try:
        _work(pipe, job, seconds)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    pipe.send(Done(reason))


def _work(pipe: Connection, job: Job, seconds: float) -> None:
    bench = Bench(job.settings, Budget(seconds), pipe.send)
    with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        steps = job.function(bench)
        next(steps, None)
        pipe.send(Ready())
        pipe.recv()
        for _ in steps:
            pass
    for text in _of_the_package(seen):
        bench.emit(Row(job.section, job.what, 1, "warning", job.batch, note=f"{FAILED} {text}"[:200]))


def _of_the_package(seen: Sequence[Any]) -> list[str]:
    """The package's warnings, once each: that an op runs without kernels, that a step is not recorded, and so on."""
    texts = (str(each.message).splitlines()[0] for each in seen)
    return list(dict.fromkeys(text for text in texts if text.startswith("moeca")))
