"""Steps that run op by op until another process has compiled them (option `background`).

    the first call of a kind    trace the step, hand its parts to the compile worker, run the step function
    the next ones               run the step function, until the worker is done
    the one after that          compile: each part is on disk by now; validate; from here on compiled code runs

The worker is one process, started at the first job and ended after an idle minute. Whatever goes wrong with it, steps
are compiled in this process, as without it.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Lock, Thread, Timer
from typing import Any

import torch
from torch import Tensor

from moeca_compile._torch_private import cache_folder, compiling, current_settings, load_inductor
from moeca_compile.disk.form import described, graph_form
from moeca_compile.disk.keys import digest, environment
from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.lower.found_before import keeps, was_validated
from moeca_compile.lower.parts import Part
from moeca_compile.lower.program import PartedStep
from moeca_compile.lower.sizes import Family
from moeca_compile.notes import Notes
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.passes.rewrite.step_function import StepFunction, StepResult
from moeca_compile.text import first_line, plural, seconds

_log = logging.getLogger(__name__)

Missing = Sequence[tuple[Part, Sequence[Family]]]
"""Parts to compile, each with the families that may differ from it in a size alone (lower.parts)."""

_IDLE = 60.0
"""Seconds without a job after which the worker ends: it takes memory."""
_SILENT = 900.0
"""Seconds without an answer after which it counts as hanging. It answers before each part, which takes seconds."""


@dataclass(eq=False)
class Job:
    """Parts of one step that the worker compiles.

    Attributes:
        all_sizes: whether one code may serve several sizes.
        over: whether it is done, or failed.
        compiled: how many parts were not on disk before.
        failed: why it failed, if it did.
        seconds: how long it took, with what was compiled before it.
    """

    message: bytes
    parts: int
    all_sizes: bool = False
    over: bool = False
    compiled: int = 0
    failed: str = ""
    since: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0


@dataclass
class EarlyStep:
    """A step that is not compiled yet: its step function, run op by op.

    Attributes:
        name: of its kind.
        lower: compiles and checks the step, given an example call, the job's `all_sizes` and `compiled`.
    """

    name: str
    function: StepFunction
    job: Job
    lower: Callable[..., StepFunction]
    notes: Notes
    runs: int = 0

    @property
    def waits(self) -> bool:
        """Whether the worker is not done yet."""
        return not self.job.over

    def __call__(self, inputs: Sequence[Any], state: dict[str, Tensor], weights: Tensor) -> StepResult:
        self.runs += 1
        self.notes.early_runs[self.name] += 1
        with torch.no_grad():
            return self.function(inputs, state, weights)

    def finished(self, inputs: Sequence[Any], state: dict[str, Tensor], weights: Tensor) -> StepFunction:
        """The compiled step, once it `waits` no longer; the arguments are an example call."""
        job, ran = self.job, f"{self.name} steps ran {plural(self.runs, 'time')} op by op"
        done = f"another process compiled {plural(job.compiled, 'part')} in {seconds(job.seconds)}"
        self.notes.progress.say(f"{ran}, while {done}" if not job.failed else f"{ran}; compiling fails: {job.failed}")
        return self.lower(inputs, state, weights, job.all_sizes, job.compiled)


def why_at_once(compiled: CompiledGraph) -> str | None:
    """Why steps of this graph are compiled before they run, though the option is on; None where they need not."""
    if compiled.config.lowering != "inductor":
        return "steps are not compiled"
    if compiled.device.type != "cpu":
        return "it has only been tried on a CPU"
    if compiled.groups:
        return "other ranks take part"
    if not keeps(compiled.config):
        return "nothing is kept on disk"
    return None


def begin(compiled: CompiledGraph, kind: StepKind, step: PartedStep, key: str | None, notes: Notes) -> Job | None:
    """Have the worker compile a step; None, with the reason in the log, where it cannot or need not.

    Args:
        key: of the validation of the step's code for one batch size. What was validated before is compiled before.
    """
    job, why = None, why_at_once(compiled)
    if why is None:
        try:
            missing = compiled.captured.parts.missing(step.subgraphs, step.random)
            all_sizes = compiled.config.all_sizes(compiled.device) and any(others for _, others in missing)
            if not missing or (not all_sizes and was_validated(key)):
                return None
            job = Job(message_of(missing, step.random, all_sizes, compiled.device), len(missing), all_sizes)
            _worker.submit(job)
            for part, _ in missing if all_sizes else ():  # so that later jobs rest on what this one compiles
                compiled.captured.parts.note(part, step.random)
        except Exception as error:  # ops of the user's, or settings that cannot be handed over
            job, why = None, first_line(error)
    if job is None:
        notes.progress.say(f"{kind.name} steps are compiled before they run: {why}")
        return None
    parts, notes.progress.outcome = plural(job.parts, "part"), "handed over"
    notes.progress.say(f"{kind.name} steps run op by op, until another process has compiled their {parts}")
    return job


def message_of(missing: Missing, random: bool, all_sizes: bool, device: torch.device) -> bytes:
    """What the worker is given. Raises NoFormError where ops or inputs have no form.

    Args:
        random: whether the step draws random numbers.
        all_sizes: whether one code may serve several sizes.
    """
    parts = [
        (graph_form(each.module()), [described(value) for value in each.examples()], others)
        for each, others in missing
    ]
    message = {
        "folder": str(cache_folder()),
        "settings": current_settings(),
        "device": str(device),
        "environment": digest(environment(device)),
        "random": random,
        "all_sizes": all_sizes,
        "parts": parts,
    }
    return pickle.dumps(message)


class Worker:
    """The compile worker of this process, and the thread that talks to it. Both start at the first job."""

    def __init__(self, command: Sequence[str] = ("-m", "moeca_compile.lower.compile_worker")) -> None:
        self.command = command
        self.jobs, self.lock, self.starting = SimpleQueue[Job](), Lock(), Lock()
        self.unfinished: set[Job] = set()
        self.thread: Thread | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.closed = False

    def submit(self, job: Job) -> None:
        """Take a job, which is over at some time, whatever happens."""
        with self.lock:
            if self.thread is None:
                thread = Thread(target=self._serve, name="moeca_compile background", daemon=True)
                thread.start()  # this may raise
                self.thread = thread
            self.unfinished.add(job)
            self.jobs.put(job)

    def end(self) -> None:
        """End the process, if there is one. The next job starts another."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()

    def close(self) -> None:
        """End the process for good."""
        with self.starting:
            self.closed = True
        self.end()

    def forget(self) -> None:
        """In a process that was forked: all jobs are over, and the worker does not wait for this one to end."""
        for job in self.unfinished:
            job.over = True
        if self.process is not None and self.process.stdin is not None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.process.stdin.fileno())
            os.close(nowhere)

    def _serve(self) -> None:
        while True:
            try:
                job = self.jobs.get(timeout=_IDLE if self.process else None)
            except Empty:
                self.end()
                continue
            try:
                self._do(job, self.process or self._started())
                with compiling():
                    load_inductor()  # so that the next call need not
            except Exception as error:
                job.failed = first_line(error)
                _log.debug("the compile worker failed, so a step is compiled in this process: %s", job.failed)
                self.end()
            job.seconds, job.over = time.perf_counter() - job.since, True
            self.unfinished.discard(job)

    def _started(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        with self.starting:
            if self.closed:
                raise RuntimeError("the process ends")
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", *self.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
                start_new_session=True,  # an interrupt of this process does not reach it; it ends with the pipe
            )
            return self.process

    def _do(self, job: Job, process: subprocess.Popen[bytes]) -> None:
        """Have a job done. Raises any exception where that fails."""
        assert process.stdin is not None and process.stdout is not None
        with _Watch(process.kill) as watch:
            process.stdin.write(job.message)
            process.stdin.flush()
            for line in process.stdout:
                watch.begin()
                answer = json.loads(line)
                if "failed" in answer:
                    job.failed = str(answer["failed"])
                    _log.debug("the compile worker could not compile a step: %s", job.failed)
                    return
                if "compiled" in answer:
                    job.compiled = int(answer["compiled"])
                    return
                _log.debug("the compile worker begins part %d of %d", int(answer["part"]), job.parts)
        raise RuntimeError("it ended, or did not answer")


class _Watch:
    """Calls a function if too long nothing begins."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def begin(self) -> None:
        self.timer.cancel()
        self.__enter__()

    def __enter__(self) -> _Watch:
        self.timer = Timer(_SILENT, self.call)
        self.timer.daemon = True
        self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()


_worker = Worker()


def _forked() -> None:
    """The thread is not in a process that was forked, and the worker is another's."""
    global _worker
    _worker.forget()
    _worker = Worker()


atexit.register(lambda: _worker.close())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
