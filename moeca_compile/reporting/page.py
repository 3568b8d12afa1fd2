"""The report as one page of HTML that needs nothing else: made from the report's plain values alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2
from markupsafe import Markup

import moeca_compile
from moeca_compile.reporting import svg
from moeca_compile.reporting.trace import Trace, TracedStep, trace_from
from moeca_compile.text import binary_bytes, count, flop_count, percent, plural, seconds

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_MAPS = 60
"""Maps of a figure; of more steps, or experts, that many are shown, evenly spaced."""
_MANY_REGIONS = 12
"""A longer list of regions is folded, unless some are skipped."""


def page_of(values: Mapping[str, Any]) -> str:
    """The page for the plain values of a report (`Report.to_dict`)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        version=moeca_compile.__version__,
        report=values,
        title=", ".join(filter(None, [values["config"].get("recipe"), values["device"], values["dtype"]])),
        facts=list(_facts(values)),
        kinds=_kinds(values["regions"]),
        regions=sorted(values["regions"], key=lambda region: region["status"] == "cached"),
        folded=len(values["regions"]) > _MANY_REGIONS and all(r["status"] == "cached" for r in values["regions"]),
        traces=[_Traced(f"trace-{i}", trace_from(trace)) for i, trace in enumerate(values["traces"])],
        memory=_bars(values["memory"], binary_bytes),
        stages=_bars(values["compile_seconds"], seconds),
        options=[(name, _option(value)) for name, value in values["config"].items()],
        binary_bytes=binary_bytes,
        plural=plural,
    )


def _facts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What most people want to know, with a few words each."""
    steps = values["steps"]
    if steps:
        kinds = ", ".join(f"{number} {kind}" for kind, number in steps.items())
        yield plural(sum(steps.values()), "step"), kinds
    if values["flops"]:
        yield f"{values['flops']['speedup']:.2f}x", "fewer FLOPs than full steps alone"
    if values["match_ratio"] is not None:
        yield percent(values["match_ratio"]), "of branches matched on cache steps"
        yield percent(values["reuse_ratio"]), "of branches reused on cache steps"
    if values["planned_cache_bytes"]:
        yield binary_bytes(values["planned_cache_bytes"]), "caches of a stream"
    if values["compile_seconds"]:
        yield seconds(sum(values["compile_seconds"].values())), "compiled in"


def _kinds(regions: Sequence[Mapping[str, str]]) -> list[tuple[str, int, int]]:
    """Kind, number and number cached, for each kind of region."""
    found: dict[str, list[bool]] = {}
    for region in regions:
        found.setdefault(region["kind"], []).append(region["status"] == "cached")
    return [(kind, len(cached), sum(cached)) for kind, cached in found.items()]


def _bars(values: Mapping[str, float], shown: Any) -> list[tuple[str, Markup, str]]:
    most = max(values.values(), default=0) or 1
    return [(name, svg.bar(value / most), shown(value)) for name, value in values.items()]


def _option(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


class _Traced:
    """The figures of one trace. One that there is nothing to draw for is None."""

    def __init__(self, key: str, trace: Trace) -> None:
        self.key, self.trace = key, trace
        self.numbers = [str(step.number) for step in trace.steps]

    @property
    def heading(self) -> str:
        calls = sum(sum(step.kinds.values()) for step in self.trace.steps)
        return (
            f"{plural(calls, 'call')} of {plural(len(self.trace.steps), 'step')}, "
            f"{plural(self.trace.samples, 'sample')} of {plural(self.trace.tokens, 'token')}"
        )

    @property
    def schedule(self) -> Markup:
        steps = self.trace.steps
        heights, kinds = [step.seconds for step in steps], [step.kind for step in steps]
        notes = [_note(step) for step in steps]
        return svg.step_bars(
            f"{self.key}-schedule", "Kind and time of each step", self.numbers, heights, kinds, notes
        )

    @property
    def match(self) -> Markup | None:
        return self._by_layer("match", "Match ratio by layer and step")

    @property
    def reuse(self) -> Markup | None:
        return self._by_layer("reuse", "Reuse ratio by layer and step")

    def _by_layer(self, name: str, title: str) -> Markup | None:
        rows = self.trace.by_layer(name)
        if not rows:
            return None
        least = min(value for row in rows for value in row if value is not None)
        # Ratios are mostly high: a scale from 0 would show no difference.
        low = max(0.0, min(0.9, int(10 * least - 0.5) / 10))
        return svg.heat_map(f"{self.key}-{name}", title, self.trace.layers, self.numbers, rows, percent, low, 1.0)

    @property
    def most_recomputed(self) -> float:
        """The largest share of recomputed tokens at any place and step."""
        return max((share for step in self.trace.steps for share in step.tokens), default=0.0)

    @property
    def tokens_legend(self) -> Markup:
        return svg.legend("never", percent(self.most_recomputed))

    @property
    def maps(self) -> list[tuple[Markup, str]]:
        """Where tokens were recomputed, with a caption, for each cache step."""
        with_tokens = [step for step in self.trace.steps if any(step.tokens)]
        every = -(-len(with_tokens) // _MOST_MAPS) or 1
        top = self.most_recomputed
        columns = self.trace.grid[1] if self.trace.grid else max(1, round(self.trace.tokens**0.5))
        found = []
        for step in with_tokens[::every]:
            share = percent(mean(step.tokens))
            title = f"Recomputed tokens of step {step.number}: {share} of all, at most {percent(max(step.tokens))}"
            figure = svg.token_map(f"{self.key}-tokens-{step.number}", title, step.tokens, columns, top)
            found.append((figure, f"step {step.number}, {share}"))
        return found

    @property
    def none_recomputed(self) -> bool:
        """Whether tokens could be recomputed, and none was."""
        return any(step.tokens for step in self.trace.steps) and not self.most_recomputed

    @property
    def drift(self) -> Markup | None:
        steps = self.trace.with_drift
        if not steps:
            return None
        rows = [[step.drift[i] for step in steps] for i in range(len(self.trace.regions))]
        numbers = [str(step.number) for step in steps]
        title = "Drift by region and step"
        return svg.heat_map(f"{self.key}-drift", title, self.trace.regions, numbers, rows, percent)

    @property
    def balance(self) -> Markup | None:
        """Branches of each expert, over those that each had if all had as many."""
        rows = [self._even(self._totals(layer)) for layer in range(len(self.trace.layers))]
        if not any(rows):
            return None
        most = max(map(len, rows))
        padded: list[list[float | None]] = [[*row, *[None] * (most - len(row))] for row in rows]
        experts = [str(expert) for expert in range(most)]
        title = "Branches by expert and layer, over an even share"
        high = max(2.0, *(number for row in rows for number in row))
        return svg.heat_map(
            f"{self.key}-balance", title, self.trace.layers, experts, padded, _times, high=high, axis="expert"
        )

    @property
    def balance_in_time(self) -> tuple[str, Markup] | None:
        """The layer whose branches are spread the least evenly, and its experts step by step."""
        totals = [self._totals(layer) for layer in range(len(self.trace.layers))]
        if not any(map(any, totals)):
            return None
        layer = max(range(len(totals)), key=lambda i: max(self._even(totals[i]), default=0.0))
        steps = [step for step in self.trace.steps if step.routing and step.routing[layer]]
        columns = [self._even(step.routing[layer]) for step in steps]
        by_expert = [[column[expert] for column in columns] for expert in range(len(totals[layer]))]
        name, numbers = self.trace.layers[layer], [str(step.number) for step in steps]
        experts = [f"expert {expert}" for expert in range(len(by_expert))]
        title = f"Branches by expert and step in {name}, over an even share"
        high = max(2.0, *(number for row in by_expert for number in row))
        return name, svg.heat_map(f"{self.key}-balance-time", title, experts, numbers, by_expert, _times, high=high)

    @property
    def most_active(self) -> int:
        """The largest number of branches of an expert at any place."""
        return max((max(places) for places in self.trace.activation), default=0)

    @property
    def activation_legend(self) -> Markup:
        return svg.legend("never", plural(self.most_active, "time"))

    @property
    def activation(self) -> list[tuple[Markup, str]]:
        """Where in the picture the token was routed to an expert, with a caption, for each expert."""
        if self.trace.grid is None:
            return []
        counts = self.trace.activation
        every, columns = -(-len(counts) // _MOST_MAPS) or 1, self.trace.grid[1]
        total, top = sum(map(sum, counts)) or 1, self.most_active
        found = []
        for expert, places in list(enumerate(counts))[::every]:
            share, name = percent(sum(places) / total), f"expert {expert}"
            most = plural(max(places), "time")
            title = f"Places of {name} in {self.trace.mapped_layer}: {share} of branches, at most {most} at a place"
            key = f"{self.key}-activation-{expert}"
            found.append((svg.token_map(key, title, places, columns, top), f"{name}, {share}"))
        return found

    def _totals(self, layer: int) -> list[float]:
        known = [step.routing[layer] for step in self.trace.steps if step.routing and step.routing[layer]]
        return [float(sum(column)) for column in zip(*known, strict=True)]

    def _even(self, branches: Sequence[float]) -> list[float]:
        total = sum(branches)
        return [len(branches) * number / total for number in branches] if total else []

    @property
    def costs(self) -> list[tuple[str, ...]]:
        """For each kind of step: its name, steps, FLOPs and time with their bars, and FLOPs a second."""
        kinds = self.trace.kinds
        flops, times = (max((getattr(k, name) or 0.0 for k in kinds), default=0.0) for name in ("flops", "seconds"))
        rows: list[tuple[str, ...]] = []
        for kind in kinds:
            rate = f"{flop_count(kind.flops / kind.seconds)}/s" if kind.flops and kind.seconds else "-"
            rows.append(
                (
                    kind.name,
                    count(kind.steps),
                    svg.bar(kind.flops / flops) if kind.flops and flops else "",
                    flop_count(kind.flops) if kind.flops else "-",
                    svg.bar(kind.seconds / times) if kind.seconds and times else "",
                    _milliseconds(kind.seconds),
                    rate,
                )
            )
        return rows

    @property
    def table(self) -> list[tuple[str, ...]]:
        """The values of the figures, step by step, as means over layers."""
        return [
            (
                str(step.number),
                f"{step.time:.4g}",
                step.kind,
                _milliseconds(step.seconds),
                _mean(step.match, percent),
                _mean(step.reuse, percent),
                _mean(step.recomputed, count),
                _mean(step.drift, percent),
            )
            for step in self.trace.steps
        ]


def _note(step: TracedStep) -> str:
    kinds = ", ".join(f"{number} {kind}" for kind, number in step.kinds.items())
    return f"step {step.number}, time {step.time:.4g}: {kinds}, {_milliseconds(step.seconds)}"


def _milliseconds(time: float | None) -> str:
    return "-" if time is None else f"{1000 * time:.3g} ms"


def _mean(values: Sequence[float | None], shown: Any) -> str:
    known = [value for value in values if value is not None]
    return str(shown(mean(known))) if known else "-"


def _times(value: float) -> str:
    return f"{value:.2f}x"
