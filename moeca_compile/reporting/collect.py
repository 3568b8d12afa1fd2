"""The public `report` and `reset` of a compiled model. Neither runs the model."""

from __future__ import annotations

import dataclasses
from statistics import fmean
from typing import Any

from torch import fx, nn

from moeca_compile import capture
from moeca_compile._torch_private import compiled_module
from moeca_compile.fallback import why_left
from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.passes.rewrite.kinds import COUNTERS, PROBE, REUSING
from moeca_compile.reporting.bypass import methods_past_the_compiled
from moeca_compile.reporting.found import record_of
from moeca_compile.reporting.memory import memory_by_kind
from moeca_compile.reporting.peak import peak_memory
from moeca_compile.reporting.places import places_of
from moeca_compile.reporting.report import Flops, ForecastErrors, GraphBreak, Region, Report
from moeca_compile.reporting.traced import trace_of
from moeca_compile.runtime.loop import StepLoop
from moeca_compile.runtime.record import Record
from moeca_compile.runtime.tallies import Counted

COUPLED = "it routes the samples of a batch together, so a sample's result depends on the others"
UNPROVEN = "not validated yet: on the first inputs its values were constant; see the warnings"
AS_A_WHOLE = "with all of the branch or the blocks that it is in; by itself it is not, since {0}"
AT_EVERY_STEP = "the recipe runs it at every step"


def report(model: Any) -> Report:
    """What was found, cached, spent and saved so far.

    Args:
        model: what `torch.compile(model, backend="moeca")` returned for a module, a function or a method, or a module
            compiled in place by `module.compile(backend="moeca")`.

    Never runs anything. Raises TypeError for a model that is not compiled.
    """
    record, module = record_of(model), compiled_module(model)
    if record is None:
        left = why_left(module)
        return Report(warnings=(*filter(None, [left]), *methods_past_the_compiled(module), *_refusals(module)))
    module = module or _module_of(record)
    loops = [loop for engine in record.engines for loop in engine.loops.values()]
    notes, last = record.notes, loops[-1].compiled if loops else None
    counted = [each for engine in record.engines for each in engine.counted()]
    counts, cache_steps = _counts(counted)
    regions, weights = tuple(regions_of(last)) if last else (), sum(engine.weight_bytes for engine in record.engines)
    return Report(
        graphs=len(record.engines) + record.untouched,
        graph_breaks=tuple(GraphBreak(*item) for item in record.breaks),
        regions=regions,
        places=places_of(module, {region.name for region in regions}),
        cache_bytes=sum(loop.streams.nbytes for loop in loops),
        planned_cache_bytes=sum(loop.compiled.plan.nbytes for loop in loops),
        memory=memory_by_kind([loop.compiled for loop in loops], weights),
        **peak_memory(last.device if last else None, weights),
        compile_seconds=dict(notes.seconds),
        from_disk=dict(notes.from_disk),
        compiled_parts=notes.parts,
        parts_beside=notes.parts_beside,
        early_runs=dict(notes.early_runs),
        pass_matches=dict(notes.matches),
        steps=_steps(counted),
        match_ratio=_ratio(counts["matched"], counts["branches"]),
        reuse_ratio=_ratio(counts["branches"] - counts["recomputed"], counts["branches"]),
        recomputed_branches_per_step=_ratio(counts["recomputed"], cache_steps if counts["branches"] else 0),
        corrections=sum(each.tallies.corrections for each in counted),
        forecast_errors=_forecast_errors(counted),
        magnitude_ratios=_magnitude_ratios(loops[-1]) if loops else (),
        probes=sum(each.tallies.probes for each in counted),
        flops=_flops(counted),
        validation_errors=dict(notes.errors),
        warnings=(*notes.warnings, *_refusals(module)),
        device=str(last.device) if last else None,
        dtype=str(last.dtype) if last else None,
        config=dataclasses.asdict(last.config if last else record.config),
        traces=tuple(found for loop in loops if (found := trace_of(loop)) is not None),
    )


def reset(model: Any) -> None:
    """Drop all caches of a compiled model. Its compiled graphs and the report's counters stay.

    Args:
        model: as for `report`.

    Raises TypeError for a model that is not compiled.
    """
    record = record_of(model)
    for engine in record.engines if record else ():
        engine.reset()


def _module_of(record: Record) -> nn.Module | None:
    """The model where it was compiled in a function: the first module that a graph is called for."""
    modules = (ref() for engine in record.engines for ref in engine.captured.modules)
    return next((module for module in modules if module is not None), None)


def regions_of(compiled: CompiledGraph) -> list[Region]:
    """All regions. A region is cached if its output, or a value computed from it alone, comes from a cache."""
    regions, replaced = compiled.regions, compiled.plan.replaced
    idle = AT_EVERY_STEP if compiled.caching else _why_idle(compiled)

    unproven, names = set(regions.unproven), {part.name for part in regions.parts}
    if unproven - names:  # the changes of blocks, which have no names: all that is in them
        unproven |= names

    def region(kind: str, name: str, node: fx.Node, how: str = "") -> Region:
        how = UNPROVEN if name in unproven else how
        return Region(kind, name, "cached", how) if node in replaced else Region(kind, name, "skipped", idle)

    found = [region("attention", a.name, a.residual.output) for a in regions.attentions]
    for layer in regions.experts:
        found.append(region("router", layer.name, layer.marker, COUPLED if layer.coupled else ""))
        found.append(region("experts", layer.name, layer.marker))
        found += [region("feedforward", shared.name, shared.output) for shared in layer.shared]
    found += [region("feedforward", f.name, f.output) for f in regions.feedforwards]
    for left in regions.skipped:
        whole = left.node in replaced
        how = AS_A_WHOLE.format(left.reason) if whole else left.reason
        found.append(Region(left.kind, left.name, "cached" if whole else "skipped", how))
    return found


def _why_idle(compiled: CompiledGraph) -> str:
    """Why nothing in this graph is cached."""
    policy, regions = compiled.config.policy, compiled.regions
    if not policy.caches:
        return "the recipe caches nothing"
    if regions.skipped and not policy.applies(regions):
        return f"the recipe needs {policy.needs}, and none is cached"
    return "see the warnings"


def _magnitude_ratios(loop: StepLoop) -> tuple[float, ...]:
    """Those that the streams have measured at the most steps, as a mean over these streams."""
    decides = loop.compiled.config.policy.decides
    found = [decides.ratios(memory) for memory in list(loop.streams.memories.values())] if decides is not None else []
    most = max(map(len, found), default=0)
    return tuple(map(fmean, zip(*(ratios for ratios in found if len(ratios) == most), strict=True)))


def _counts(counted: list[Counted]) -> tuple[dict[str, float], int]:
    """The counters of all cache steps, summed over layers, and the number of cache steps."""
    counts, steps = dict.fromkeys(COUNTERS, 0.0), 0
    for tally in (tally for each in counted for kind, tally in each.tallies.items() if not kind.full):
        steps += tally.steps
        if tally.counts is not None:
            for name, value in zip(COUNTERS, tally.counts.sum(0).tolist(), strict=True):
                counts[name] += value
    return counts, steps


def _steps(counted: list[Counted]) -> dict[str, int]:
    """Number of steps by kind."""
    steps: dict[str, int] = {}
    for kind, tally in ((kind, tally) for each in counted for kind, tally in each.tallies.items()):
        steps[kind.name] = steps.get(kind.name, 0) + tally.steps
    return steps


def _forecast_errors(counted: list[Counted]) -> ForecastErrors | None:
    errors = [each.tallies.errors for each in counted]
    number = sum(each.number for each in errors)
    mean = _ratio(sum(each.sum for each in errors), number)
    return None if mean is None else ForecastErrors(number, mean, max(each.largest for each in errors))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _flops(counted: list[Counted]) -> Flops | None:
    tallies = [(each.flops, kind, tally.steps) for each in counted for kind, tally in each.tallies.items()]
    calls = sum(steps for _, _, steps in tallies)
    full = sum(each.tallies.steps * each.uncached for each in counted)
    spent = sum(steps * flops[kind] for flops, kind, steps in tallies)
    spent += sum(n * each.flops[REUSING] for each in counted if (n := each.tallies.forecasts))
    spent += sum(n * each.flops[PROBE] for each in counted if (n := each.tallies.probes))
    return Flops(full / calls, spent / calls) if calls and full else None


def _refusals(module: nn.Module | None) -> tuple[str, ...]:
    return tuple(f"{r.where} {r.method}: {r.reason}" for r in capture.refusals(module))
