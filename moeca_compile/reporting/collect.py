"""Make a report from the record of a compiled model, and drop its caches. Neither runs the model."""

from __future__ import annotations

import dataclasses
from typing import Any

from moeca_compile import capture
from moeca_compile._torch_private import wrapper_of
from moeca_compile.passes.regions import Regions
from moeca_compile.reporting.report import Flops, GraphBreak, Region, Report
from moeca_compile.runtime.record import Record, record_of


def report(model: Any) -> Report:
    """What is known of `model = torch.compile(..., backend="moeca")` so far. Never runs anything.

    Raises TypeError for a model that was not compiled by torch.compile.
    """
    record = _record(model)
    if record is None:
        return Report(warnings=_refusals())
    shapes = [s for engine in record.engines for s in engine.by_shape.values()]
    regions = [region for s in shapes[-1:] for region in _regions(s.regions, s.caching, s.config.family)]
    counts = record.counts
    return Report(
        graphs=len(record.engines) + record.untouched,
        graph_breaks=tuple(GraphBreak(*item) for item in record.breaks),
        regions=tuple(regions),
        cache_bytes=sum(s.sessions.nbytes for s in shapes),
        compile_seconds=dict(record.seconds),
        steps=dict(record.steps),
        match_ratio=_ratio(counts["matched"], counts["branches"]),
        reuse_ratio=_ratio(counts["branches"] - counts["recomputed"], counts["branches"]),
        recomputed_branches_per_step=_ratio(counts["recomputed"], record.cache_steps if counts["branches"] else 0),
        flops=_flops(record),
        validation_errors=dict(record.errors),
        warnings=(*record.warnings, *_refusals()),
        device=record.device,
        dtype=record.dtype,
        config=dataclasses.asdict(record.config),
    )


def reset(model: Any) -> None:
    """Drop all caches of a compiled model; its compiled graphs and counters stay.

    Raises TypeError for a model that was not compiled by torch.compile.
    """
    record = _record(model)
    for engine in record.engines if record else ():
        engine.reset()


def _record(model: Any) -> Record | None:
    wrapper = wrapper_of(model)
    if wrapper is None:
        raise TypeError(
            f"{type(model).__name__} is not compiled: pass what torch.compile(model, backend='moeca') returned"
        )
    return record_of(wrapper)


def _regions(regions: Regions, caching: bool, family: str) -> list[Region]:
    status = "cached" if caching and family != "none" else "kept"
    reason = "" if status == "cached" else "the recipe caches nothing" if family == "none" else "see the warnings"
    found = [Region("attention", a.name, status, reason) for a in regions.attentions]
    for layer in regions.experts:
        found += [Region("router", layer.name, status, reason), Region("experts", layer.name, status, reason)]
        found += [Region("feedforward", s.name, status, reason) for s in layer.shared]
    found += [Region("feedforward", f.name, status, reason) for f in regions.feedforwards]
    return found + [Region(k.kind, k.name, "kept", k.reason) for k in regions.kept]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _flops(record: Record) -> Flops | None:
    calls = sum(record.steps.values())
    if not calls or not record.flops:
        return None
    return Flops(record.flops_if_full / calls, record.flops / calls)


def _refusals() -> tuple[str, ...]:
    return tuple(f"{r.where} {r.method}: {r.reason}" for r in capture.refusals())
