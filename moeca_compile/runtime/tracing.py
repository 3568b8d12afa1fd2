"""Traces: what each step of a generation does, layer by layer, collected only where somebody asks for it.

Counters are those that compiled steps return anyway. What they do not return (which tokens, which experts, how far
outputs have moved) comes from the same step run once more before it, op by op and on copies of what it changes. So
compiled steps are the same with a trace as without, and their numbers too.

Calls with one step number are added up, over streams and generations: memory grows with the steps of a generation,
not with how long a model is traced. Which experts each place's token takes is counted for one layer, over all steps.
On an accelerator nothing is read before `Tracer.log` is.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.lower.validate import run_eagerly
from moeca_compile.notes import Notes
from moeca_compile.passes.analysis.graph import between, shape_of
from moeca_compile.passes.match.regions import Experts
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.passes.rewrite.step_function import StepResult
from moeca_compile.runtime.streams import Stream
from moeca_compile.text import first_line

_log = logging.getLogger(__name__)

_MOST_STEPS = 1000
"""Steps of a generation beyond this number are not traced."""
_ELEMENTS = 1 << 16
"""At most so many elements of a region's output are kept to compare the next one with, for each stream."""
FAILED = "tracing a step failed ({0}), so no more steps of this graph are traced. Its results are not affected"

OPEN: list[Callable[[], Notes | None]] = []
"""For each model that is traced for a while, what gives its notes. They may not be there before its first call."""


@contextmanager
def tracing(notes: Callable[[], Notes | None]) -> Iterator[None]:
    """Trace all steps of the model with these notes meanwhile, in whatever thread."""
    OPEN.append(notes)
    try:
        yield
    finally:
        OPEN.remove(notes)


def is_traced(notes: Notes) -> bool:
    """Whether the model with these notes is traced for a while."""
    return any(of() is notes for of in list(OPEN))


@dataclass
class StepLog:
    """All calls with one step number. Tensors are sums over calls, on the model's device.

    Attributes:
        kinds: the number of calls by the name of their step kind.
        time: of the last call.
        seconds: the fewest that a call of each kind took, after it was compiled; of those that are measured.
        counts: (MoE layers, COUNTERS) of cache steps; None before the first.
        tokens: (N,) how often each token of the main stream was recomputed; None before the first cache step.
        rows: how many samples of layers `tokens` is summed over.
        routing: (MoE layers, E) branches by expert, NaN in rows of layers whose router has not run.
        drift: (regions,) relative changes, and `moves` (regions,) of how many calls.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    time: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    counts: Tensor | None = None
    tokens: Tensor | None = None
    rows: int = 0
    routing: Tensor | None = None
    drift: Tensor | None = None
    moves: Tensor | None = None


class Tracer:
    """The trace of one graph at one set of input shapes."""

    def __init__(self, compiled: CompiledGraph, notes: Notes) -> None:
        self.compiled, self.notes = compiled, notes
        regions = compiled.regions
        self.layers: tuple[Experts, ...] = regions.experts
        self.regions = outputs_of(compiled)
        """Kind, name and output of each region, in graph order."""
        self.main_tokens = regions.main.tokens if regions.main is not None else 0
        self.mapped = mapped_layer(compiled)
        self.activation: Tensor | None = None
        """(E, N) how often each place's token was routed to each expert of `mapped`, over all steps."""
        self.steps: dict[int, StepLog] = {}
        self.seconds: dict[str, float] = {}
        """The fewest that a step of each kind took."""
        self.failed = False
        self._pending: list[tuple[int, str, Any, Any]] = []
        self._lock = threading.RLock()

    def observe(
        self, kind: StepKind, number: int, time: float, stream: Stream, inputs: Sequence[Any], weights: Tensor
    ) -> None:
        """Run a step that is about to run, op by op. Nothing of the model changes, whatever happens here."""
        if self.failed or number >= _MOST_STEPS:
            return
        seen = _Seen(self, kind, stream)
        try:
            run_eagerly(self.compiled, kind, inputs, stream.state, weights, updates=False, observer=seen)
            with self._lock:
                log = self.steps.setdefault(number, StepLog())
                log.kinds[kind.name] += 1
                log.time = time
                seen.add_to(log)
        except Exception as error:
            _log.debug("tracing a step failed", exc_info=True)
            self.failed = True
            self.notes.warn(FAILED.format(first_line(error)))

    def run(self, kind: StepKind, number: int, step: Callable[[], StepResult]) -> StepResult:
        """Run the step itself, with its time and counters."""
        clock = _clock(self.compiled.device)
        start = clock()
        result = step()
        end = clock()
        if self.failed or number >= _MOST_STEPS:
            return result
        with self._lock:
            log = self.steps.setdefault(number, StepLog())
            if result.counts is not None:
                log.counts = _sum(log.counts, result.counts)
            self._pending.append((number, kind.name, start, end))
            self._settle(wait=False)
        return result

    def log(self) -> dict[int, StepLog]:
        """What was collected, by step number. The host waits until all of it is there."""
        with self._lock:
            self._settle(wait=True)
            return {number: self.steps[number] for number in sorted(self.steps)}

    def watched(self, kind: StepKind) -> dict[fx.Node, list[fx.Node]]:
        """The outputs and routings that a step of this kind computes as the model does, by when they are there."""
        plan = self.compiled.plan
        reused = [r for r in plan.replacements if r.reused_at(kind)]
        cached = {node for r in reused for node in between(r.source, [r.node])}
        found: dict[fx.Node, list[fx.Node]] = {}
        for _, _, output in self.regions:
            if output not in cached and (kind.full or output in plan.replaced):
                found.setdefault(output, []).append(output)
        for layer in self.layers:
            if layer.marker not in cached:
                found.setdefault(layer.marker, []).append(layer.choice)
        return found

    def _settle(self, wait: bool) -> None:
        """Take over the times of steps that have ended on the device; of all, if it may wait."""
        left = []
        for number, kind, start, end in self._pending:
            if wait and isinstance(end, torch.cuda.Event):
                end.synchronize()
            if isinstance(end, torch.cuda.Event) and not end.query():
                left.append((number, kind, start, end))
                continue
            seconds = _seconds(start, end)
            if seconds is not None:
                for fewest in (self.steps.setdefault(number, StepLog()).seconds, self.seconds):
                    fewest[kind] = min(seconds, fewest.get(kind, math.inf))
        self._pending = left


class _Seen:
    """What one step computes and decides (passes.rewrite.step.Observer)."""

    def __init__(self, tracer: Tracer, kind: StepKind, stream: Stream) -> None:
        self.tracer, self.stream = tracer, stream
        self.watched = tracer.watched(kind)
        self.region_at = {output: i for i, (_, _, output) in enumerate(tracer.regions)}
        self.layer_at = {layer.choice: i for i, layer in enumerate(tracer.layers)}
        self.marker_at = {layer.marker: i for i, layer in enumerate(tracer.layers)}
        self.routing: dict[int, Tensor] = {}
        self.activation: Tensor | None = None
        self.drift: dict[int, Tensor] = {}
        self.tokens: Tensor | None = None
        self.rows = 0

    def see(self, node: fx.Node, value: Tensor) -> None:
        if node in self.region_at:
            now = sketch(value)
            last = self.stream.traced.get(node)
            if last is not None:
                self.drift[self.region_at[node]] = (now - last).norm() / now.norm().clamp_min(1e-30)
            self.stream.traced[node] = now
        if node in self.layer_at:
            at = self.layer_at[node]
            layer = self.tracer.layers[at]
            self.routing[at] = branches_by_expert(value, layer.body.experts)
            if layer is self.tracer.mapped:
                self.activation = branches_by_place(value, layer.body.experts, self.tracer.main_tokens)

    def recomputed(self, marker: fx.Node, tokens: Tensor, routed: Tensor) -> None:
        at = self.marker_at[marker]
        self.routing[at] = routed.sum((0, 1)).float()
        if self.tracer.layers[at] is self.tracer.mapped:
            self.activation = routed.sum(0).float().T
        if tokens.shape[1] == self.tracer.main_tokens:
            self.tokens = _sum(self.tokens, tokens.sum(0).float())
            self.rows += len(tokens)

    def add_to(self, log: StepLog) -> None:
        if self.tokens is not None:
            log.tokens, log.rows = _sum(log.tokens, self.tokens), log.rows + self.rows
        if self.activation is not None:
            self.tracer.activation = _sum(self.tracer.activation, self.activation)
        if self.routing:
            log.routing = _sum_of_known(log.routing, self._rows(self.routing, len(self.tracer.layers)))
        if self.drift:
            known = torch.stack(self._rows(self.drift, len(self.tracer.regions)))
            log.drift = _sum(log.drift, known.nan_to_num())
            log.moves = _sum(log.moves, (~known.isnan()).float())

    def _rows(self, found: dict[int, Tensor], count: int) -> list[Tensor]:
        some = next(iter(found.values()))
        most = max((value.numel() for value in found.values()), default=1)
        nothing = torch.full((most,) if some.ndim else (), math.nan, device=some.device)
        padded = {i: torch.nn.functional.pad(v, (0, most - len(v))) if v.ndim else v for i, v in found.items()}
        return [padded.get(i, nothing) for i in range(count)]


def outputs_of(compiled: CompiledGraph) -> tuple[tuple[str, str, fx.Node], ...]:
    """Kind, name and output of every region that is recognized, in graph order."""
    regions = compiled.regions
    found = [("attention", part.name, part.residual.output) for part in regions.attentions]
    for layer in regions.experts:
        found.append(("experts", layer.name, layer.marker))
        found += [("feedforward", shared.name, shared.output) for shared in layer.shared]
    found += [("feedforward", part.name, part.output) for part in regions.feedforwards]
    return tuple(sorted(found, key=lambda region: region[2]))


def branches_by_expert(choice: Tensor, experts: int) -> Tensor:
    """(E,) branches of each expert, from ids (rows, k) or a mask (rows, E). Nothing is read back."""
    if choice.dtype == torch.bool:
        return choice.reshape(-1, experts).sum(0).float()
    ids = choice.reshape(-1).long()
    ones = torch.ones_like(ids, dtype=torch.float32)
    return torch.zeros(experts, device=ids.device).scatter_add(0, ids, ones)


def branches_by_place(choice: Tensor, experts: int, tokens: int) -> Tensor:
    """(E, N) branches of each expert at each place, over samples, from ids (B * N, k) or a mask (B * N, E)."""
    if choice.dtype != torch.bool:
        ids = choice.long()
        choice = torch.zeros(len(ids), experts, dtype=torch.bool, device=ids.device).scatter(1, ids, True)
    return choice.reshape(-1, tokens, experts).sum(0).float().T


def sketch(value: Tensor) -> Tensor:
    """At most _ELEMENTS elements of a value, evenly over all of it, in float32."""
    flat = value.detach().reshape(-1)
    step = max(1, math.ceil(flat.numel() / _ELEMENTS))
    width = value.shape[-1] if value.ndim else 1
    while math.gcd(step, width) > 1:  # else it would see some of the features alone
        step += 1
    return flat[::step].to(torch.float32, copy=True)


def grid_of(compiled: CompiledGraph) -> tuple[int, int] | None:
    """Rows and columns in which the tokens of the main stream lie over the picture; None where that is not known."""
    main = compiled.regions.main
    if main is None:
        return None
    shape = shape_of(compiled.placeholders[compiled.picture]) if compiled.picture is not None else ()
    if len(shape) == 4:
        *_, height, width = shape
        patch = math.isqrt(height * width // main.tokens)
        if patch and height % patch == 0 == width % patch and height * width == patch * patch * main.tokens:
            return height // patch, width // patch
    side = math.isqrt(main.tokens)
    return (side, side) if side * side == main.tokens else None


def mapped_layer(compiled: CompiledGraph) -> Experts | None:
    """The MoE layer whose experts are counted by place: the middle one of those on the main stream.

    It does not depend on what is sampled, so that reports of the same model show the same layer. None where there is
    no MoE layer, or where it is not known how tokens lie over the picture.
    """
    regions = compiled.regions
    if grid_of(compiled) is None or regions.main is None:
        return None
    layers = [layer for layer in regions.experts if regions.axis(layer.marker) == regions.main.axis]
    return layers[len(layers) // 2] if layers else None


def _sum(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total + value


def _sum_of_known(total: Tensor | None, rows: list[Tensor]) -> Tensor:
    """Sums by row, where a row of NaN adds nothing."""
    value = torch.stack(rows)
    if total is None:
        return value
    width = max(total.shape[1], value.shape[1])
    total, value = (torch.nn.functional.pad(each, (0, width - each.shape[1])) for each in (total, value))
    both = total.nan_to_num() + value.nan_to_num()
    return torch.where(total.isnan().any(1, keepdim=True) & value.isnan().any(1, keepdim=True), math.nan, both)


def _clock(device: torch.device) -> Callable[[], Any]:
    """Gives the time on the device, without waiting for it; None where nobody tells it."""
    if device.type == "cpu":
        return time.perf_counter
    if device.type != "cuda":
        return lambda: None

    def event() -> Any:
        with torch.cuda.device(device):
            found = torch.cuda.Event(enable_timing=True)
            found.record()
        return found

    return event


def _seconds(start: Any, end: Any) -> float | None:
    if end is None:
        return None
    return start.elapsed_time(end) / 1000 if isinstance(end, torch.cuda.Event) else end - start
