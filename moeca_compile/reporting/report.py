"""The report as plain values and as text: what was found, what is cached, what it costs and saves."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeca_compile.reporting.plots import plot
from moeca_compile.reporting.save import save, target
from moeca_compile.reporting.trace import Trace, trace_from
from moeca_compile.text import binary_bytes, count, first_line, flop_count, percent, plural, seconds

PARTS = "compiled parts"
KINDS = ("router", "experts", "attention", "feedforward")


@dataclass(frozen=True)
class Region:
    """A part of the model that was recognized.

    Attributes:
        kind: "router", "experts", "attention" or "feedforward".
        name: the module's path.
        status: "cached", or "skipped" if it runs at every step.
        reason: why it is skipped, or a remark on how it is cached.
    """

    kind: str
    name: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class GraphBreak:
    """A place where Dynamo could not trace on.

    Attributes:
        where: file:line.
        reason: what could not be traced.
    """

    where: str
    reason: str


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one call of the model.

    Attributes:
        full_step: of a full step.
        mean_step: the mean over all steps so far.

    Raises ValueError unless both are above 0.
    """

    full_step: float
    mean_step: float

    def __post_init__(self) -> None:
        if not (self.full_step > 0 and self.mean_step > 0):
            raise ValueError(f"FLOPs must be above 0, not {self.full_step} and {self.mean_step}")

    @property
    def speedup(self) -> float:
        """How many times fewer FLOPs a step needs on average than a full step."""
        return self.full_step / self.mean_step


@dataclass(frozen=True)
class ForecastErrors:
    """How far forecasts were from the outputs of full steps, relative to these (option `max_error`).

    Attributes:
        number: how many were measured.
        mean, largest: of these; 0.1 is 10 %. Each is that of the worst sample of its batch.
    """

    number: int
    mean: float
    largest: float


@dataclass(frozen=True)
class Report:
    """The state of one compiled model when the report was made, in plain values.

    Attributes:
        graphs: number of graphs compiled.
        graph_breaks: where Dynamo had to stop.
        regions: all recognized regions, cached and skipped.
        places: file:line of their code, by name.
        cache_bytes: bytes of all caches that exist now.
        planned_cache_bytes: bytes of the caches of one stream by plan, summed over graphs.
        memory: bytes of the weights, and of the caches of one stream by what they hold.
        peak_bytes: the most bytes that tensors took at a time, beside the model's weights; None where nobody counts.
        peak_measured: how that was measured, or why it was not.
        compile_seconds: seconds of each stage of compilation, in order.
        from_disk: how much of what was compiled or found out was on disk from an earlier process, by kind.
        compiled_parts: how many parts of steps were compiled, those on disk among them.
        parts_beside: how many of these another process compiled, while steps ran op by op (option `background`).
        early_runs: how often steps ran op by op before they were compiled, by step kind.
        pass_matches: how many places each normalizing pass rewrote.
        steps: number of calls by step kind (`full`, `cache`, `cache[16]`, ...).
        corrections: number of full steps that made up for the cache steps before them (option `corrector`).
        forecast_errors: what was found at full steps, and decided when the next one came (option `max_error`); None
            where nothing was.
        probes: number of probes that ran beside these steps, to decide by the data which of them are full.
        magnitude_ratios: what recipe magcache has measured, a number for each step of a generation; the mean, where
            there are several streams.
        match_ratio: share of the branches on cache steps that were in the cache.
        reuse_ratio: share of the branches on cache steps whose cached output was used.
        recomputed_branches_per_step: mean over cache steps. It and the ratios are None before the first cache step of
            a recipe that caches branches.
        flops: None before the first step, or if the cost is not known.
        validation_errors: largest relative error of each check.
        warnings: all warnings so far, with the reasons why classes were not captured.
        device, dtype: those of the graph that was used last.
        config: all options with their values.
        traces: what was traced, for each graph and set of input shapes (`moeca_compile.trace`).
    """

    graphs: int = 0
    graph_breaks: tuple[GraphBreak, ...] = ()
    regions: tuple[Region, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)
    cache_bytes: int = 0
    planned_cache_bytes: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    peak_bytes: int | None = None
    peak_measured: str = ""
    compile_seconds: Mapping[str, float] = field(default_factory=dict)
    from_disk: Mapping[str, int] = field(default_factory=dict)
    compiled_parts: int = 0
    parts_beside: int = 0
    early_runs: Mapping[str, int] = field(default_factory=dict)
    pass_matches: Mapping[str, int] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    corrections: int = 0
    forecast_errors: ForecastErrors | None = None
    probes: int = 0
    magnitude_ratios: tuple[float, ...] = ()
    match_ratio: float | None = None
    reuse_ratio: float | None = None
    recomputed_branches_per_step: float | None = None
    flops: Flops | None = None
    validation_errors: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    device: str | None = None
    dtype: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    traces: tuple[Trace, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-serializable values."""
        values = {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(self)}
        if self.flops is not None:
            values["flops"]["speedup"] = self.flops.speedup
        return values

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to a file.

        Args:
            path: `report.html` is one page with figures, which opens without a network; `report.json` has what
                `to_dict` returns, and the command `moeca report` reads it.

        Raises ValueError for any other ending, and OSError where the file cannot be written.
        """
        where = target(path)
        save(self.to_dict(), where)

    def plot(self, figure: str, ax: Any = None) -> Any:
        """Draw a figure of the first trace with matplotlib.

        Args:
            figure: "match" or "reuse" by layer and step (the paper's figure 8 is one over the other), "tokens"
                recomputed by position and step, "drift" by region and step (figure 9), "routing": branches by layer
                and expert (figure 4 a), or "activation": branches by expert and position in the middle MoE layer
                (figure 2 b).
            ax: the axes to draw on; a new figure's if None.

        Returns the axes. Raises ValueError for any other figure and where nothing was traced, ImportError without
        matplotlib.
        """
        return plot(self.traces, figure, ax)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report of which `to_dict` gave these values.

        Raises ValueError where they are of no report, or of one that another version has written.
        """
        try:
            known: dict[str, Any] = dict(values)
            known["warnings"] = tuple(known["warnings"])
            known["graph_breaks"] = tuple(GraphBreak(**item) for item in known["graph_breaks"])
            known["regions"] = tuple(Region(**item) for item in known["regions"])
            known["traces"] = tuple(map(trace_from, known["traces"]))
            if known["flops"] is not None:
                known["flops"] = Flops(known["flops"]["full_step"], known["flops"]["mean_step"])
            if known["forecast_errors"] is not None:
                known["forecast_errors"] = ForecastErrors(**known["forecast_errors"])
            return cls(**known)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"these are not the values of a report of this version ({first_line(error)})") from error

    def __str__(self) -> str:
        parts = [
            _title(self),
            *_graph_lines(self),
            *_region_lines(self),
            *_cache_lines(self),
            *_step_lines(self),
            *_check_lines(self),
            *_trace_lines(self),
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(parts)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)  # torch.dtype, torch.device


def _title(report: Report) -> str:
    known = [str(report.config.get("recipe", "")), report.device or "", report.dtype or ""]
    return ", ".join(["moeca_compile report", *filter(None, known)])


def _graph_lines(report: Report) -> list[str]:
    if not report.graphs:
        why = " (see the warnings)" if report.warnings else ""
        return [
            f"nothing compiled: the model has not been called, or torch.compile runs it as plain Python{why}, or by "
            "code that it compiled for another model of the class with gradients or in parts (see that one's report)"
        ]
    breaks = plural(len(report.graph_breaks), "graph break") if report.graph_breaks else "no graph breaks"
    lines = [f"{plural(report.graphs, 'graph')}, {breaks}"]
    return lines + [f"  {item.where}: {item.reason}" for item in report.graph_breaks]


def _region_lines(report: Report) -> list[str]:
    if not report.graphs:
        return []
    if not report.regions:
        return ["regions: nothing was found to cache; the model runs as under plain torch.compile"]
    lines = ["regions:"]
    for kind in sorted({r.kind for r in report.regions}, key=_kind_order):
        of_kind = [region for region in report.regions if region.kind == kind]
        cached = sum(region.status == "cached" for region in of_kind)
        lines.append(f"  {kind}: {len(of_kind)} found, {cached} cached")
        lines += [f"    cached {r.name}: {r.reason}" for r in of_kind if r.status == "cached" and r.reason]
        lines += [f"    skipped {r.name}: {r.reason or 'no reason given'}" for r in of_kind if r.status != "cached"]
    return lines


def _kind_order(kind: str) -> tuple[int, str]:
    return (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)


def _cache_lines(report: Report) -> list[str]:
    lines = []
    if report.cache_bytes or report.planned_cache_bytes:
        planned = binary_bytes(report.planned_cache_bytes)
        lines.append(f"cache: {binary_bytes(report.cache_bytes)} allocated, {planned} a stream planned")
    if report.peak_bytes is not None:
        lines.append(f"memory: {binary_bytes(report.peak_bytes)} at the peak beside the weights")
    if report.compile_seconds:
        stages = ", ".join(f"{stage} {seconds(time)}" for stage, time in report.compile_seconds.items())
        lines.append(f"compile time: {seconds(sum(report.compile_seconds.values()))} ({stages})")
    known = [(number, kind) for kind, number in report.from_disk.items() if number and kind != PARTS]
    found = [plural(number, kind.removesuffix("s")) for number, kind in known]
    if report.compiled_parts:
        found.append(f"{report.from_disk.get(PARTS, 0)} of {report.compiled_parts} {PARTS}")
    if any(report.from_disk.values()):
        lines.append(f"from disk: {', '.join(found)}")
    if report.early_runs:
        ran = ", ".join(f"{number} {kind}" for kind, number in report.early_runs.items())
        lines.append(f"compiled beside: {report.parts_beside} of {report.compiled_parts} {PARTS}; run before: {ran}")
    return lines


def _step_lines(report: Report) -> list[str]:
    lines = []
    if report.steps:
        kinds = ", ".join(f"{number} {kind}" for kind, number in report.steps.items())
        corrected = f", {report.corrections} of the full ones corrected" if report.corrections else ""
        probed = f", decided by {plural(report.probes, 'probe')}" if report.probes else ""
        lines.append(f"steps: {sum(report.steps.values())} ({kinds}){corrected}{probed}")
    if report.forecast_errors is not None:
        errors = report.forecast_errors
        lines.append(
            f"forecast errors at {plural(errors.number, 'full step')}: {percent(errors.mean)} on average, "
            f"{percent(errors.largest)} at most"
        )
    ratios = {"matched": report.match_ratio, "reused": report.reuse_ratio}
    known = [f"{percent(ratio)} {name}" for name, ratio in ratios.items() if ratio is not None]
    if known:
        lines.append(f"branches on cache steps: {', '.join(known)}")
    if report.recomputed_branches_per_step is not None:
        lines.append(f"recomputed branches per cache step: {count(report.recomputed_branches_per_step)}")
    if report.flops is not None:
        full, mean = flop_count(report.flops.full_step), flop_count(report.flops.mean_step)
        lines.append(f"FLOPs: {full} a full step, {mean} a step on average, {report.flops.speedup:.2f}x fewer")
    return lines


def _trace_lines(report: Report) -> list[str]:
    calls = [sum(step.kinds.values()) for trace in report.traces for step in trace.steps]
    return [f"trace: {plural(sum(calls), 'call')} of {plural(len(calls), 'step')}"] if calls else []


def _check_lines(report: Report) -> list[str]:
    if not report.validation_errors:
        return []
    errors = ", ".join(f"{check} {error:.1e}" for check, error in report.validation_errors.items())
    return [f"validation, greatest relative error: {errors}"]
