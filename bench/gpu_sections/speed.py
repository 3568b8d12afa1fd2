"""Time of a step on the published models: ours against torch.compile, with and without CUDA graphs, and eager.

A way of running a model is compiled, warmed up, measured and dropped before the next one begins. A period is one full
step and three cache steps, its time that of all four with one wait at its end; `full` and `cache` steps are then
measured one by one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import moeca_compile
from bench.gpu_sections.common import Bench, Row, build, synchronize
from examples import families
from examples.machine import private_copy

PERIOD, WARM, TURNS = 4, 4, 8
BASE, EAGER, GRAPHED = "torch.compile", "eager", "torch.compile reduce-overhead"
OURS = {
    "moeca-forecast": {"recipe": "moeca-forecast", "full_every": PERIOD},
    "moeca": {"recipe": "moeca", "full_every": PERIOD},
    "none": {"recipe": "none"},
}
ORDER = (BASE, "moeca-forecast", "moeca", EAGER, GRAPHED, "none")
"""The most important ways first, and what they are compared with before all."""

FIRST_GUESS = 45.0
"""Seconds that a way is thought to take before one was seen."""


@dataclass
class Times:
    """Milliseconds of a step: in a period as a whole, and alone."""

    period: float
    full: float
    cache: float
    seconds: float
    """What it took to compile and warm up."""


def compiled(way: str, model: nn.Module) -> nn.Module:
    own = private_copy(model)
    if way == EAGER:
        return own
    if way in OURS:
        backend = moeca_compile.moeca_backend
        return torch.compile(own, backend=backend, options=OURS[way])  # type: ignore[return-value]
    mode = "reduce-overhead" if way == GRAPHED else "default"
    return torch.compile(own, mode=mode, dynamic=False)  # type: ignore[return-value]


def run(bench: Bench) -> None:
    progress = Progress()
    for batch in bench.batches:
        for name in bench.models:
            what = f"{name}, batch {batch}"
            bench.attempt("speed", what, 2 * progress.longest, partial(ways, bench, name, batch, progress))


@dataclass
class Progress:
    """How long one way took, at most, and the time of a step by torch.compile."""

    longest: float = FIRST_GUESS
    base: float | None = None


def ways(bench: Bench, name: str, batch: int, progress: Progress) -> None:
    """Measure all ways of running one model at one batch."""
    model, progress.base = build(name, bench), None
    for way in ORDER:
        one = partial(measured, bench, model, name, batch, way, progress)
        bench.attempt("speed", f"{name}, batch {batch}, {way}", progress.longest, one)
        dropped()


def measured(bench: Bench, model: nn.Module, name: str, batch: int, way: str, progress: Progress) -> None:
    start = time.monotonic()
    times = measure(bench, lambda: compiled(way, model), inputs(bench, model, batch))
    progress.longest = time.monotonic() - start
    if way == BASE:
        progress.base = times.period
    report(bench, f"{name}, {way}", batch, times, progress.base, cached=way in OURS and way != "none")


def report(bench: Bench, what: str, batch: int, times: Times, base: float | None, cached: bool) -> None:
    steps = {"mean": times.period, **({"full": times.full, "cache": times.cache} if cached else {})}
    for step, value in steps.items():
        ratio = round(base / value, 3) if base else ""
        note = f"ready in {times.seconds:.0f} s" if step == "mean" else ""
        bench.emit(Row("speed", what, value, "ms", batch, step, ratio, BASE if base else "", note))


def inputs(bench: Bench, model: nn.Module, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    x, t, y = families.inputs_for(model, batch=batch)  # type: ignore[arg-type]
    return x.to(bench.dtype), t, y


def measure(bench: Bench, make: Callable[[], nn.Module], arguments: tuple[Tensor, Tensor, Tensor]) -> Times:
    """Compile and warm up one way, then time it."""
    turns = 1 if bench.small else TURNS
    start = time.monotonic()
    call = Steps(make(), *arguments)
    for _ in range(WARM):  # three of them until a full step is recorded and compared
        call.period(bench.device)
    seconds = time.monotonic() - start
    together = median(call.period(bench.device) / PERIOD for _ in range(turns))
    apart = [[call.step(bench.device) for _ in range(PERIOD)] for _ in range(turns)]
    full, cache = median(turn[0] for turn in apart), median(each for turn in apart for each in turn[1:])
    return Times(together, full, cache, seconds)


class Steps:
    """Calls of a model at falling timesteps."""

    def __init__(self, model: Any, x: Tensor, t: Tensor, y: Tensor) -> None:
        self.model, self.x, self.t, self.y = model, x, t, y
        self.time = 900.0

    def period(self, device: torch.device) -> float:
        """Milliseconds of one full step and the cache steps after it, with one wait at their end."""
        return timed(lambda: [self.call() for _ in range(PERIOD)], device)

    def step(self, device: torch.device) -> float:
        return timed(self.call, device)

    def call(self) -> None:
        self.time -= 0.5
        torch.compiler.cudagraph_mark_step_begin()
        with moeca_compile.step(self.time):
            self.model(self.x, self.t.fill_(self.time), self.y)


def timed(function: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return 1000 * (time.perf_counter() - start)


def dropped() -> None:
    """Free what the last way held."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
