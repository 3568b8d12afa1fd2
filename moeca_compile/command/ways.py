"""The ways to sample that are compared: eager, plain torch.compile, and recipes; and how each is measured."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import moeca_compile
from moeca_compile._torch_private import not_on_compile_start, on_every_compile_start
from moeca_compile.command.named import raised
from moeca_compile.command.own_code import with_own_code
from moeca_compile.reporting.report import Report

EAGER, COMPILED = "eager", "torch.compile"
AGAIN = 4
"""How often a generation is run again for what was compiled in it: a bucket of capacities, another number of rows."""
Sample = Callable[[Any, int], Tensor]


@dataclass
class Way:
    """One way to sample, and what was measured of it.

    Attributes:
        options: of a recipe; None where nothing is cached.
        first_seconds: of the first generation, in which all is compiled.
        seconds, results: of the timed generations, one a seed. Results are on the CPU.
        held_bytes: that the first generation has left on the device; None where the device does not say.
        peak_bytes: the most that a timed generation took beside what was there before; likewise.
        cache_bytes: the most that the caches took after a generation.
        steps: calls of the model by kind, in the timed generations.
        later_compile_seconds: that generations were longer for which something was compiled after the first one.
        still_compiling: whether something was compiled in a generation that counts, the last of AGAIN.
        failure: what it raised. It is not run any more then.
    """

    name: str
    model: Any
    options: Mapping[str, Any] | None = None
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    held_bytes: int | None = None
    peak_bytes: int | None = None
    cache_bytes: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    later_compile_seconds: float = 0.0
    still_compiling: bool = False
    failure: str = ""

    @property
    def report(self) -> Report | None:
        return None if self.options is None else moeca_compile.report(self.model)


def eager(model: nn.Module) -> Way:
    return Way(EAGER, with_own_code(model))


def compiled_plainly(model: nn.Module) -> Way:
    return Way(COMPILED, torch.compile(with_own_code(model)))


def compiled_with(model: nn.Module, name: str, options: Mapping[str, Any]) -> Way:
    return Way(name, torch.compile(with_own_code(model), backend="moeca", options=dict(options)), options)


def warm_up(way: Way, sample: Sample, seed: int, device: torch.device) -> None:
    """Run the first generation, in which all is compiled."""
    before = _allocated(device)
    with _noting_failure(way):
        _, way.first_seconds = generation(way, sample, seed, device)
        after = _allocated(device)
        way.held_bytes = max(0, after - before) if before is not None and after is not None else None
        _note_caches(way)


def timed(way: Way, sample: Sample, seed: int, device: torch.device) -> None:
    """Run a generation and add its figures. If something was compiled in it, run it again."""
    longer: list[float] = []
    with _noting_failure(way):
        while True:
            before, report = _allocated(device), way.report
            if before is not None:
                torch.cuda.reset_peak_memory_stats(device)
            with _compilations() as started:
                result, spent = generation(way, sample, seed, device)
            if not (started() or _compiled_since(report, way.report)):
                break
            if len(longer) == AGAIN:
                way.still_compiling = True
                break
            longer.append(spent)
        way.later_compile_seconds += sum(max(0.0, each - spent) for each in longer)
        way.seconds.append(spent)
        way.results.append(result.detach().to("cpu", copy=True))  # a sampler may fill one buffer again
        if before is not None:
            way.peak_bytes = max(way.peak_bytes or 0, torch.cuda.max_memory_allocated(device) - before)
        _note_caches(way)
        _note_steps(way, report)


def generation(way: Way, sample: Sample, seed: int, device: torch.device) -> tuple[Tensor, float]:
    """The result of one generation and its wall-clock seconds. Torch's own generator has that seed, too."""
    torch.manual_seed(seed)
    _wait_for(device)
    start = time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report has ours
        result = sample(way.model, seed)
    _wait_for(device)
    return result, time.perf_counter() - start


@contextmanager
def counted_calls(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Count the calls of a model inside, also those of `model.forward`. Yields what returns their number."""
    calls, forward = 0, model.forward
    own = vars(model).get("forward")  # hooks of other libraries replace it in the instance

    def counting(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*arguments, **keywords)

    model.forward = counting
    try:
        yield lambda: calls
    finally:
        del model.forward
        if own is not None:
            model.forward = own


@contextmanager
def _noting_failure(way: Way) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        way.failure = raised(error)


def _note_caches(way: Way) -> None:
    report = way.report
    if report is not None:
        way.cache_bytes = max(way.cache_bytes, report.cache_bytes)


@contextmanager
def _compilations() -> Iterator[Callable[[], int]]:
    """Yields what returns how often Dynamo has begun to compile inside."""
    begun: list[None] = []

    def begin(*_: Any) -> None:
        begun.append(None)

    on_every_compile_start(begin)
    known = len(begun)  # 1 where this torch has no such callbacks: they are called when they are given
    try:
        yield lambda: len(begun) - known
    finally:
        not_on_compile_start(begin)


def _compiled_since(before: Report | None, after: Report | None) -> bool:
    """Whether the backend compiled a kind of step between two reports; Dynamo has no part in that."""
    return before is not None and after is not None and before.compile_seconds != after.compile_seconds


def _note_steps(way: Way, before: Report | None) -> None:
    after = way.report
    if before is not None and after is not None:
        more = {kind: number - before.steps.get(kind, 0) for kind, number in after.steps.items()}
        way.steps.update({kind: way.steps.get(kind, 0) + number for kind, number in more.items() if number})


def _allocated(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
