"""A way in a process of its own, so that what one compiles or patches changes no other. Generations run on demand.

    with Worker(subject, way) as worker:      # a fork of this process, which has imported all packages
        worker.found                          # what setting it up showed
        worker.generate(seed)                 # a Generation

A way that raises, dies or takes too long has the reason in `worker.failure`.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import moeca_compile
from bench.live_bytes import LiveBytes
from bench.peer_sections.subjects import Subject
from bench.peer_sections.ways import OURS, Running, Way, generate, set_up

PATIENCE = 400.0
"""Most seconds until a way is set up or has run a generation."""
WARM = 3
"""At most so many generations until one compiles nothing."""


@dataclass
class Found:
    """What setting up a way and its first generations showed.

    Attributes:
        first_seconds: of the first generation, with all compilation.
        full_steps: steps at which the block in the middle was computed; None where that was not counted.
        still_compiling: whether the last generation before the timed ones compiled, too.
        cache_mib: what the tool says that it keeps; None where it does not say.
    """

    first_seconds: float = 0.0
    full_steps: int | None = None
    graphs: int = 0
    breaks: int = 0
    recompiles: int = 0
    still_compiling: bool = False
    cache_mib: float | None = None


@dataclass
class Generation:
    """Its pictures, and what it took. `peak_mib` is the most beyond weights and inputs, caches among them."""

    pictures: Tensor
    seconds: float
    cpu_seconds: float
    peak_mib: float


class Worker:
    """The process of a way. `failure` says why it can be asked for nothing more."""

    def __init__(self, subject: Subject, way: Way, threads: int = 1) -> None:
        self.failure, self.found = "", Found()
        context = get_context("fork")
        self._mine, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(subject, way, threads, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.found = self._answer() or self.found

    def generate(self, seed: int) -> Generation | None:
        if self.failure:
            return None
        self._mine.send(seed)
        return self._answer()

    def _answer(self) -> Any:
        try:
            if not self._mine.poll(PATIENCE):
                self.failure = f"gave up after {PATIENCE:.0f} s"
                return None
            answer = self._mine.recv()
        except (EOFError, ConnectionError):
            self.failure = "the process died"
            return None
        if isinstance(answer, str):
            self.failure = answer
            return None
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self._mine.close()
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()


def _serve(subject: Subject, way: Way, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    torch._inductor.config.compile_threads = 1  # a pool of compilers would be one more process for each way
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns at every compilation
            live = LiveBytes(torch.device("cpu"))
            running = set_up(way, subject)
            base = live.now
            found = first_generations(running, subject)
            pipe.send(found)
            while True:
                seed = pipe.recv()
                live.restart_peak()
                pipe.send(_timed(running, subject, seed, lambda: (live.peak - base) / 2**20))
    except EOFError:
        return
    except Exception as error:  # its row says so
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _timed(running: Running, subject: Subject, seed: int, peak_mib: Any) -> Generation:
    start, cpu = time.perf_counter(), time.process_time()
    pictures = generate(running, subject, seed)
    return Generation(pictures, time.perf_counter() - start, time.process_time() - cpu, peak_mib())


def first_generations(running: Running, subject: Subject) -> Found:
    """Generate until nothing is compiled any more. In eager the first one counts full steps."""
    found, start = Found(), time.perf_counter()
    with _computed(running, subject) as calls:
        generate(running, subject, seed=0)
        found.full_steps = calls()
    found.first_seconds = time.perf_counter() - start
    if running.way.compiled:
        for _ in range(WARM):
            before = _compiled_so_far(running)
            generate(running, subject, seed=0)
            found.still_compiling = _compiled_so_far(running) != before
            if not found.still_compiling:
                break
    found.graphs, found.breaks, found.recompiles = graph_counts()
    if running.way.tool == OURS:
        report = moeca_compile.report(running.model)
        found.cache_mib = report.cache_bytes / 2**20
        generations = sum(report.steps.values()) / subject.steps
        found.full_steps = round(report.steps.get("full", 0) / generations)
    return found


@contextmanager
def _computed(running: Running, subject: Subject) -> Iterator[Any]:
    """Count the calls of a layer inside a block. Nothing is hooked in what is compiled."""
    if running.way.compiled:
        yield lambda: None
        return
    calls: list[None] = []
    layer = running.model.get_submodule(subject.probe)
    hook = layer.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield lambda: len(calls)
    finally:
        hook.remove()


def graph_counts() -> tuple[int, int, int]:
    """Graphs that this process has compiled, places where Dynamo broke one, and frames that were compiled anew."""
    again = sum(bool(metric.compile_id and int(metric.compile_id.split("/")[1])) for metric in _metrics())
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), again


def _metrics() -> list[Any]:
    return torch._dynamo.utils.get_compilation_metrics()


def _compiled_so_far(running: Running) -> Any:
    seconds = moeca_compile.report(running.model).compile_seconds if running.way.tool == OURS else None
    return len(_metrics()), seconds
