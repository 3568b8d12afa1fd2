"""Make a report from the record of a compiled model, and drop its caches. Neither runs the model."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from moeca_compile import capture
from moeca_compile._torch_private import wrapper_of
from moeca_compile.passes.rewrite.step import COUNTERS, StepKind
from moeca_compile.reporting.report import Flops, GraphBreak, Region, Report
from moeca_compile.runtime.record import Record, find_record
from moeca_compile.runtime.specialization import Specialization

COUPLED = "it routes the samples of a batch together, so a sample's result depends on the others"


def report(model: Any) -> Report:
    """What is known of `model = torch.compile(..., backend="moeca")` so far. Never runs anything.

    Raises TypeError for a model that was not compiled by torch.compile.
    """
    record = _record(model)
    if record is None:
        return Report(warnings=_refusals())
    shapes = [s for engine in record.engines for s in engine.by_shape.values()]
    counts, cache_steps = _counts(shapes)
    last = shapes[-1] if shapes else None
    return Report(
        graphs=len(record.engines) + record.untouched,
        graph_breaks=tuple(GraphBreak(*item) for item in record.breaks),
        regions=tuple(_regions(last)) if last else (),
        cache_bytes=sum(s.sessions.nbytes for s in shapes),
        compile_seconds=dict(record.seconds),
        steps=_steps(shapes),
        match_ratio=_ratio(counts["matched"], counts["branches"]),
        reuse_ratio=_ratio(counts["branches"] - counts["recomputed"], counts["branches"]),
        recomputed_branches_per_step=_ratio(counts["recomputed"], cache_steps if counts["branches"] else 0),
        flops=_flops(shapes),
        validation_errors=dict(record.errors),
        warnings=(*record.warnings, *_refusals()),
        device=str(last.device) if last else None,
        dtype=str(last.dtype) if last else None,
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
    module = getattr(model, "_orig_mod", model)
    compiled_in_place = getattr(module, "_compiled_call_impl", None) is not None
    if wrapper is None and not compiled_in_place:
        raise TypeError(
            f"{type(model).__name__} is not compiled: pass what torch.compile(model, backend='moeca') returned"
        )
    return find_record(wrapper, module if isinstance(module, nn.Module) else None)


def _regions(shapes: Specialization) -> list[Region]:
    regions = shapes.regions
    status, reason = ("cached", "") if shapes.caching else ("kept", _why_idle(shapes))
    found = [Region("attention", a.name, status, reason) for a in regions.attentions]
    for layer in regions.experts:
        how = COUPLED if layer.coupled and not reason else reason
        found += [Region("router", layer.name, status, how), Region("experts", layer.name, status, reason)]
        found += [Region("feedforward", s.name, status, reason) for s in layer.shared]
    found += [Region("feedforward", f.name, status, reason) for f in regions.feedforwards]
    return found + [Region(k.kind, k.name, "kept", k.reason) for k in regions.skipped]


def _why_idle(shapes: Specialization) -> str:
    """Why nothing of a graph is cached."""
    if shapes.config.family == "none":
        return "the recipe caches nothing"
    if shapes.config.family == "moeca" and shapes.regions.skipped and not shapes.regions.experts:
        return "the recipe goes by the routing of MoE layers, and none is cached"
    return "see the warnings"


def _counts(shapes: list[Specialization]) -> tuple[dict[str, float], int]:
    """Counters summed over layers and steps, and the number of cache steps."""
    counts, steps = dict.fromkeys(COUNTERS, 0.0), 0
    for tally in (t for s in shapes for k, t in s.tallies.items() if not k.full):
        steps += tally.steps
        if tally.counts is not None:
            for name, value in zip(COUNTERS, tally.counts.sum(0).tolist(), strict=True):
                counts[name] += value
    return counts, steps


def _steps(shapes: list[Specialization]) -> dict[str, int]:
    """Steps by kind."""
    steps: dict[str, int] = {}
    for kind, tally in ((k, t) for s in shapes for k, t in s.tallies.items()):
        steps[kind.name] = steps.get(kind.name, 0) + tally.steps
    return steps


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _flops(shapes: list[Specialization]) -> Flops | None:
    tallies = [(s, kind, tally.steps) for s in shapes for kind, tally in s.tallies.items()]
    calls = sum(steps for _, _, steps in tallies)
    full = sum(steps * s.plan.flops(StepKind()) for s, _, steps in tallies)
    spent = sum(s.flops(kind) for s, kind, _ in tallies)
    return Flops(full / calls, spent / calls) if calls and full else None


def _refusals() -> tuple[str, ...]:
    return tuple(f"{r.where} {r.method}: {r.reason}" for r in capture.refusals())
