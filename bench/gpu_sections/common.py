"""What the sections share: rows, the budget of time, timing on the device, published models with random weights."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from signal import ITIMER_REAL, SIGALRM, setitimer, signal
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from examples import families
from examples.dit import DiffusionTransformer

FAILED, WRONG = "FAILED", "WRONG"
"""What the notes of rows that tell of something bad begin with."""

TINY = "tiny"
"""In place of a published model: a few narrow blocks, to try the benchmark itself."""


@dataclass(frozen=True)
class Row:
    """One measured value: of what, in which unit, and what it is relative to (`ratio` times `against`)."""

    section: str
    what: str
    value: float
    unit: str
    batch: int | str = ""
    step: str = ""
    ratio: float | str = ""
    against: str = ""
    note: str = ""


class OutOfTimeError(Exception):
    """The time given on the command line is over."""


@dataclass
class Budget:
    """So many seconds from now; what is not begun for want of them is kept in `left_out`."""

    seconds: float
    left_out: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.start + self.seconds - time.monotonic()

    def allows(self, what: str, seconds: float) -> bool:
        """Whether something that takes about so many seconds may begin."""
        if self.left < seconds:
            self.left_out.append(what)
        return self.left >= seconds

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Raise OutOfTimeError inside when the time is over: a compilation may take longer than anyone thought."""

        def over(*_: Any) -> None:
            raise OutOfTimeError

        before = signal(SIGALRM, over)
        setitimer(ITIMER_REAL, max(0.001, self.left))
        try:
            yield
        finally:
            setitimer(ITIMER_REAL, 0)
            signal(SIGALRM, before)


@dataclass(frozen=True)
class Settings:
    """What every process of the benchmark is told."""

    device: torch.device
    dtype: torch.dtype
    models: tuple[str, ...] = (TINY,)
    batches: tuple[int, ...] = (2,)
    small: bool = False
    """Sizes of a test, and steps that run without Inductor: it tries the benchmark and measures nothing."""


@dataclass
class Bench:
    """Where a section runs, what it may take, and where its rows go."""

    settings: Settings
    budget: Budget
    emit: Callable[[Row], None]

    @property
    def device(self) -> torch.device:
        return self.settings.device

    @property
    def dtype(self) -> torch.dtype:
        return self.settings.dtype

    @property
    def small(self) -> bool:
        return self.settings.small

    def attempt(self, section: str, what: str, seconds: float, function: Callable[[], Any]) -> None:
        """Do one item of a section if there is time for it; if it fails, that is its row, and the next one comes."""
        if not self.budget.allows(f"{section}: {what}", seconds):
            return
        try:
            with torch.no_grad():
                function()
        except OutOfTimeError:
            raise
        except Exception as error:
            traceback.print_exc()
            reason = f"{FAILED} {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self.emit(Row(section, what, math.nan, "", note=reason[:200]))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(function: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Median time of a call. On CUDA of the device alone, the call being replayed as a CUDA graph."""
    function()
    if device.type != "cuda":
        return median(_wall(function) for _ in range(repeats))
    replay = _recorded(function)
    replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def _wall(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def _recorded(function: Callable[[], Any]) -> Callable[[], Any]:
    """What replays the call. Raises where it waits for the device, which no op of ours may do there."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def build(name: str, bench: Bench) -> DiffusionTransformer:
    """A model in eval mode with random weights made on the device, which is fast enough for billions of them."""
    family, sizes = families.PUBLISHED[name] if name != TINY else (families.FAMILIES["DSMoE"], None)
    with torch.device(bench.device):
        model = family.model(sizes or family.reduced)
    _randomize(model)
    return model.to(bench.dtype).eval().requires_grad_(False)


def options_of(bench: Bench, options: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options. A trial on a CPU leaves out Inductor, which takes minutes."""
    return {**options, **({"lowering": "eager"} if bench.small else {})}


def _randomize(model: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        fan_in = parameter.shape[1:].numel()
        with torch.no_grad():
            parameter.normal_(std=max(1, fan_in) ** -0.5 if parameter.dim() > 1 else 0.1)


def worst(errors: Iterable[float]) -> float:
    """The greatest error; not a number where one of them is none."""
    found = list(errors)
    return math.nan if any(map(math.isnan, found)) else max(found)


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The largest relative error of a kernel, or of a generation with CUDA graphs, that is not called wrong."""


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """In float32 and float64 the largest difference over the largest magnitude, in 16 bits root mean squares."""
    difference, scale = (found - wanted).double(), wanted.double()
    if found.dtype in (torch.float32, torch.float64):
        return float(difference.abs().max() / scale.abs().max().clamp_min(1e-30))
    return float(difference.square().mean().sqrt() / scale.square().mean().sqrt().clamp_min(1e-30))
