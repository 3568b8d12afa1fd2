"""Whole generations: recorded steps against steps that run op by op, and what a cache step asks of the host."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import moeca_compile
from bench.gpu_sections.common import (
    TOLERANCE,
    WRONG,
    Bench,
    Row,
    Settings,
    build,
    options_of,
    relative_error,
    synchronize,
    worst,
)
from bench.gpu_sections.processes import Job
from examples import families
from examples.machine import private_copy

STEPS, PERIOD = 17, 4
RECIPES = ({"recipe": "moeca", "budget": 0.25}, {"recipe": "moeca-forecast"})


@dataclass(frozen=True)
class Generation:
    """A compiled model and the sampling loop around it."""

    model: nn.Module
    bench: Bench

    def steps(self, count: int = STEPS) -> Iterator[Tensor]:
        """Euler steps; the timestep lies on the device, and the host knows it too."""
        x, t, y = families.inputs_for(self.model._orig_mod, batch=self.bench.settings.batches[0])
        x = x.to(self.bench.dtype)
        with torch.no_grad(), moeca_compile.generation():
            for number in range(count):
                time = 1000 * (1 - number / count)
                with moeca_compile.step(time):
                    out = self.model(x, t.fill_(time), y)
                x = x - out / count
                yield x


def jobs(settings: Settings) -> list[Job]:
    """One for each recipe, on the last model. Nothing here is timed, so all is done while others compile."""
    name = settings.models[-1]
    return [
        Job("generation", f"{options['recipe']}, {name}", "", partial(run, name=name, options=options), settings)
        for options in RECIPES
    ]


def run(bench: Bench, name: str, options: dict[str, object]) -> Iterator[None]:
    compared(bench, build(name, bench), f"{options['recipe']}, {name}", {**options, "full_every": PERIOD})
    yield


def compared(bench: Bench, model: nn.Module, name: str, options: dict[str, object]) -> None:
    """One generation with recorded steps, one without; then the host's part in a cache step of each."""
    found = {}
    for graphs in (True, False):
        chosen = options_of(bench, {**options, "cuda_graphs": graphs})
        own = torch.compile(private_copy(model), backend=moeca_compile.moeca_backend, options=chosen)
        generation = Generation(own, bench)
        list(generation.steps())  # compiles, records, compares
        found[graphs] = list(generation.steps())
        how = "recorded" if graphs else "op by op"
        for row in asked_of_the_host(generation, f"{name}, {how}"):
            bench.emit(row)
        for text in moeca_compile.report(own).warnings:
            bench.emit(Row("generation", f"{name}, {how}", 1, "warning", note=f"{WRONG}: {text}"))
    error = worst(relative_error(one, other) for one, other in zip(found[True], found[False], strict=True))
    note = "same bits" if all(map(torch.equal, found[True], found[False])) else "other bits"
    note = note if error <= TOLERANCE[bench.dtype] else f"{WRONG}, {note}"
    bench.emit(Row("generation", f"{name}, recorded", error, "relative error", against="op by op", note=note))


def asked_of_the_host(generation: Generation, name: str) -> Iterator[Row]:
    """Copies to the host, waits and launches in the last cache step of a generation."""
    steps = generation.steps()
    for _ in range(STEPS - 2):
        next(steps)
    synchronize(generation.bench.device)
    on_cuda = generation.bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with warnings.catch_warnings(record=True) as told, profile(activities=activities) as seen:
        warnings.simplefilter("always")
        if on_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            next(steps)
        finally:
            if on_cuda:
                torch.cuda.set_sync_debug_mode("default")
        synchronize(generation.bench.device)
    list(steps)
    names = [event.name for event in seen.events()]
    asked = {
        "copies to the host": sum("Memcpy DtoH" in each for each in names),
        "waits for the device": sum("synchronizing" in str(each.message) for each in told),
    }
    for what, count in asked.items():
        yield Row("generation", name, count, what, step="cache", note=WRONG if count else "")
    launches = sum(each.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch")) for each in names)
    yield Row("generation", name, launches, "launches", step="cache")
