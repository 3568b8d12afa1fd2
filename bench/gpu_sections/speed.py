"""One way of running a published model: time of its steps, of the host alone, until it is ready, and its memory.

A period is one full step and three cache steps, its time that of all four with one wait at its end; `full` and
`cache` steps are then measured one by one. The host's time is that until a call returns, when nothing is
queued before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import moeca_compile
from bench.gpu_sections.common import WRONG, Bench, Row, Settings, build, options_of, relative_error, synchronize
from bench.gpu_sections.processes import Job
from examples import families
from examples.machine import private_copy

PERIOD, WARM, REPEATS = 4, 4, 8
BASE, EAGER, GRAPHED = "torch.compile", "eager", "torch.compile reduce-overhead"
NONE, FORECAST, SIXTEENTH, STACK = "none", "moeca-forecast", "moeca 1/16", "stack-forecast"
OURS = {
    NONE: {"recipe": "none"},
    FORECAST: {"recipe": "moeca-forecast", "full_every": PERIOD},
    SIXTEENTH: {"recipe": "moeca", "full_every": PERIOD, "budget": 1 / 16},
    STACK: {"recipe": "stack-forecast", "full_every": PERIOD},
}
CACHING = (FORECAST, SIXTEENTH, STACK)
ORDER = (NONE, FORECAST, SIXTEENTH, BASE, STACK, EAGER, GRAPHED)
"""The most important ways first."""

FAR = 0.25
"""Relative error of a full step to the eager model from which it is wrong. In 16 bits it rounds to some 0.05 in
another order of operations; another function is off by about 1."""

MIB = 2**20


def jobs(settings: Settings, name: str, batch: int) -> list[Job]:
    """All ways of one model at one batch."""
    return [
        Job("speed", f"{name}, {way}", batch, partial(measured, name=name, batch=batch, way=way), settings)
        for way in ORDER
    ]


def compiled(way: str, model: nn.Module, bench: Bench) -> nn.Module:
    own = private_copy(model)
    if way == EAGER:
        return own
    if way in OURS:
        backend = moeca_compile.moeca_backend
        return torch.compile(own, backend=backend, options=options_of(bench, OURS[way]))  # type: ignore[return-value]
    if bench.small:
        return torch.compile(own, backend="eager", dynamic=False)  # type: ignore[return-value]
    mode = "reduce-overhead" if way == GRAPHED else "default"
    return torch.compile(own, mode=mode, dynamic=False)  # type: ignore[return-value]


def measured(bench: Bench, name: str, batch: int, way: str) -> Iterator[None]:
    """Compile and warm up, wait to be called, measure. Rows come as they are found."""
    emit = _Emit(bench, f"{name}, {way}", batch)
    model = build(name, bench)
    arguments = inputs(bench, model, batch)
    expected = eager(model, arguments)
    calls = Steps(compiled(way, model, bench), *arguments)
    del model
    memory = Memory(bench.device)
    start = time.monotonic()
    emit("first call", timed(calls.call, bench.device), "ms")
    emit("peak of the first call", memory.peak() / MIB, "MiB", note="beside weights")
    for _ in range(WARM):  # three of them until a full step is recorded and compared
        calls.period(bench.device)
    emit("ready", time.monotonic() - start, "s")
    yield
    memory.restart()
    times(bench, calls, emit, cached=way in CACHING)
    emit("peak of later calls", memory.peak() / MIB, "MiB", note="beside weights")
    emit("allocated", memory.held() / MIB, "MiB", note="beside weights")
    checked(bench, calls, expected, emit)
    if way in OURS:
        told(calls, emit)


class _Emit:
    """Emits a row of one way."""

    def __init__(self, bench: Bench, what: str, batch: int) -> None:
        self.bench, self.what, self.batch = bench, what, batch

    def __call__(self, step: str, value: float, unit: str, note: str = "") -> None:
        self.bench.emit(Row("speed", self.what, value, unit, self.batch, step, note=note))


def times(bench: Bench, calls: Steps, emit: _Emit, cached: bool) -> None:
    repeats = 1 if bench.small else REPEATS
    emit("mean", median(calls.period(bench.device) / PERIOD for _ in range(repeats)), "ms")
    apart = [[timed(calls.call, bench.device) for _ in range(PERIOD)] for _ in range(repeats)]
    if cached:
        emit("full", median(period[0] for period in apart), "ms")
        emit("cache", median(each for period in apart for each in period[1:]), "ms")
    alone = [[returned(calls.call, bench.device) for _ in range(PERIOD)] for _ in range(repeats)]
    emit("host", median(each for period in alone for each in period[1:]), "ms")


def checked(bench: Bench, calls: Steps, expected: Tensor, emit: _Emit) -> None:
    """A full step, by now recorded and replayed, against the eager model."""
    calls.time = 900.0
    with moeca_compile.generation():
        error = relative_error(calls.call(), expected)
    emit("full", error, "relative error", "" if error <= FAR else f"{WRONG}: to the eager model")


def told(calls: Steps, emit: _Emit) -> None:
    """What the report says: the bytes of its caches, and warnings: each means that something ran more slowly."""
    report = moeca_compile.report(calls.model)
    emit("caches", report.cache_bytes / MIB, "MiB")
    for text in report.warnings:
        emit("", 1, "warning", f"{WRONG}: {text}"[:200])


def inputs(bench: Bench, model: nn.Module, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    x, t, y = families.inputs_for(model, batch=batch)  # type: ignore[arg-type]
    return x.to(bench.dtype), t, y


def eager(model: nn.Module, arguments: Sequence[Tensor]) -> Tensor:
    """The model's output at the time of a generation's first step."""
    x, t, y = arguments
    return private_copy(model)(x, torch.full_like(t, 900.0 - Steps.STRIDE), y)


class Steps:
    """Calls of a model at falling timesteps."""

    STRIDE = 0.5

    def __init__(self, model: Any, x: Tensor, t: Tensor, y: Tensor) -> None:
        self.model, self.x, self.t, self.y = model, x, t, y
        self.time = 900.0

    def period(self, device: torch.device) -> float:
        """Milliseconds of one full step and the cache steps after it, with one wait at their end."""
        return timed(lambda: [self.call() for _ in range(PERIOD)], device)

    def call(self) -> Tensor:
        self.time -= self.STRIDE
        torch.compiler.cudagraph_mark_step_begin()
        with moeca_compile.step(self.time):
            out: Tensor = self.model(self.x, self.t.fill_(self.time), self.y)
        return out


@dataclass
class Memory:
    """Bytes that the allocator gave out beyond what it held at first; 0 on a CPU."""

    device: torch.device
    before: int = 0

    def __post_init__(self) -> None:
        self.before = self.held()
        self.restart()

    def restart(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def held(self) -> int:
        return torch.cuda.memory_allocated(self.device) - self.before if self.device.type == "cuda" else 0

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before if self.device.type == "cuda" else 0


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call with a wait at its end."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return 1000 * (time.perf_counter() - start)


def returned(function: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds until a call returns; the device may still be at work."""
    synchronize(device)
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)
