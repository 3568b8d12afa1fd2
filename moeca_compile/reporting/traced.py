"""The public `trace`, and what was traced so far as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from moeca_compile.passes.rewrite.kinds import COUNTERS, StepKind
from moeca_compile.reporting.found import record_of
from moeca_compile.reporting.trace import KindCost, Trace, TracedStep
from moeca_compile.runtime.loop import StepLoop
from moeca_compile.runtime.tracing import StepLog, Tracer, grid_of, tracing

_DIGITS = 6


@contextmanager
def trace(model: Any) -> Iterator[None]:
    """Collect a trace of all steps inside, for the report: what was matched, reused and recomputed in each layer.

        with moeca_compile.trace(model):
            ...  # the sampling loop
        moeca_compile.report(model).save("report.html")

    Each step is run a second time for it, op by op, so sampling takes at least twice as long; the pictures are the
    same, and so are the compiled steps. What an earlier trace collected is dropped.

    Args:
        model: as for `report`. It need not have been called yet.

    Raises TypeError for a model that is not compiled.
    """
    record = record_of(model)
    for engine in record.engines if record else ():
        for loop in list(engine.loops.values()):
            loop.forget_trace()
    with tracing(lambda: found.notes if (found := record_of(model)) is not None else None):
        yield


def trace_of(loop: StepLoop) -> Trace | None:
    """What was traced of one loop; None where nothing was. The host waits for the device."""
    tracer = loop.tracer
    logs = tracer.log() if tracer is not None else {}
    if tracer is None or not logs:
        return None
    main = tracer.compiled.regions.main
    return Trace(
        samples=main.samples if main is not None else 0,
        tokens=tracer.main_tokens,
        grid=grid_of(tracer.compiled),
        layers=tuple(layer.name for layer in tracer.layers),
        regions=tuple(f"{kind} {name}" for kind, name, _ in tracer.regions),
        steps=tuple(_step(number, log, tracer) for number, log in logs.items()),
        kinds=_kinds(loop, tracer, logs.values()),
        mapped_layer=tracer.mapped.name if tracer.mapped is not None else "",
        activation=tuple(tuple(map(round, row)) for row in _listed(tracer.activation)),
    )


def _step(number: int, log: StepLog, tracer: Tracer) -> TracedStep:
    counts = {name: _column(log.counts, place) for place, name in enumerate(COUNTERS)}
    cache_calls = sum(log.kinds.values()) - log.kinds[StepKind().name]
    layouts = tracer.compiled.regions.layouts
    rows = [cache_calls * layouts[layer.marker].samples for layer in tracer.layers]
    reused = [a - b for a, b in zip(counts["branches"], counts["recomputed"], strict=True)]
    refreshed = [a - b for a, b in zip(counts["needed"], counts["dropped"], strict=True)]
    return TracedStep(
        number=number,
        time=log.time,
        kinds=dict(log.kinds),
        seconds=log.seconds.get(log.kinds.most_common(1)[0][0]),
        match=_ratios(counts["matched"], counts["branches"]),
        reuse=_ratios(reused, counts["branches"]),
        recomputed=_ratios(refreshed, rows[: len(refreshed)]),
        tokens=tuple(round(n / log.rows, _DIGITS) for n in log.tokens.tolist()) if log.tokens is not None else (),
        routing=_routing(log.routing, tracer),
        drift=_ratios(_listed(log.drift), _listed(log.moves)),
    )


def _column(counts: Tensor | None, place: int) -> list[float]:
    return [] if counts is None else _listed(counts[:, place])


def _listed(values: Tensor | None) -> list[Any]:
    return [] if values is None else list(values.tolist())


def _ratios(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float | None, ...]:
    return tuple(round(part / whole, _DIGITS) if whole else None for part, whole in zip(parts, wholes, strict=True))


def _routing(counts: Tensor | None, tracer: Tracer) -> tuple[tuple[int, ...], ...]:
    if counts is None:
        return ()
    known = zip(counts.tolist(), tracer.layers, strict=True)
    return tuple(() if math.isnan(row[0]) else tuple(map(round, row[: layer.body.experts])) for row, layer in known)


def _kinds(loop: StepLoop, tracer: Tracer, logs: Any) -> tuple[KindCost, ...]:
    steps: dict[str, int] = {}
    for log in logs:
        for name, number in log.kinds.items():
            steps[name] = steps.get(name, 0) + number
    flops = {kind.name: loop.flops(kind) for kind in loop.tallies.by_kind}
    return tuple(KindCost(name, n, tracer.seconds.get(name), flops.get(name)) for name, n in steps.items())
