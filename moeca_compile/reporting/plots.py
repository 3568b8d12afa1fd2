"""The figures of a trace by matplotlib, for papers and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moeca_compile.reporting.trace import Trace

NO_MATPLOTLIB = "plots need matplotlib: pip install matplotlib. report.save('report.html') draws the same without it"
NOT_TRACED = (
    "nothing was traced, so there is nothing to plot. Sample once inside `with moeca_compile.trace(model):`, then "
    "make the report again"
)
EMPTY = "the trace has nothing for {0!r}: {1}"


class Grid(NamedTuple):
    """Values by row and column; NaN where there is none."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: list[list[float]]
    x: str
    y: str
    scale: str
    most: float | None = None
    """The end of the scale; the largest value if None."""
    title: str = ""


def plot(traces: Sequence[Trace], name: str, ax: Any = None) -> Any:
    """Draw a figure of the first trace on `ax`, or on a new figure; returns the axes.

    Raises ValueError for an unknown name and where nothing was traced for it, ImportError without matplotlib.
    """
    if name not in FIGURES:
        raise ValueError(f"there is no figure {name!r}. The figures are {', '.join(FIGURES)}")
    if not traces:
        raise ValueError(NOT_TRACED)
    grid = FIGURES[name](traces[0])
    if not grid.values or not grid.columns:
        raise ValueError(EMPTY.format(name, _WHY_EMPTY[name]))
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(NO_MATPLOTLIB) from error
    return _drawn(grid, pyplot.figure(layout="constrained").subplots() if ax is None else ax)


def _drawn(grid: Grid, ax: Any) -> Any:
    image = ax.imshow(grid.values, aspect="auto", cmap="Blues", vmin=0, vmax=grid.most, interpolation="nearest")
    for axis, names, label, most in ((ax.xaxis, grid.columns, grid.x, 10), (ax.yaxis, grid.rows, grid.y, 16)):
        every = -(-len(names) // most)
        axis.set_ticks(range(0, len(names), every), names[::every])
        axis.set_label_text(label)
    if grid.title:
        ax.set_title(grid.title)
    ax.figure.colorbar(image, ax=ax, label=grid.scale)
    return ax


def _match(trace: Trace) -> Grid:
    """The paper's figure 8 is reuse over match."""
    return _by_layer(trace, "match", "matched branches")


def _reuse(trace: Trace) -> Grid:
    return _by_layer(trace, "reuse", "reused branches")


def _by_layer(trace: Trace, ratio: str, scale: str) -> Grid:
    numbers = [str(step.number) for step in trace.steps]
    rows = [[_number(value) for value in row] for row in trace.by_layer(ratio)]
    return Grid(trace.layers, numbers, rows, "step", "", scale, 1.0)


def _tokens(trace: Trace) -> Grid:
    """By position and time, as the paper's figure 2 (b) has it for experts."""
    steps = [step for step in trace.steps if step.tokens]
    places = [str(place) for place in range(trace.tokens)]
    values = [list(step.tokens) for step in steps]
    return Grid([str(step.number) for step in steps], places, values, "token", "step", "recomputed")


def _drift(trace: Trace) -> Grid:
    """The paper's figure 9."""
    steps = trace.with_drift
    rows = [[_number(step.drift[i]) for step in steps] for i in range(len(trace.regions))]
    return Grid(trace.regions, [str(step.number) for step in steps], rows, "step", "", "relative change")


def _routing(trace: Trace) -> Grid:
    """Branches of each expert over all steps, as the paper's figure 4 (a) counts them."""
    known = [step.routing for step in trace.steps if step.routing]
    rows = [[sum(column) for column in zip(*filter(None, layer), strict=True)] for layer in zip(*known, strict=True)]
    most = max(map(len, rows), default=0)
    padded = [[*map(float, row), *[float("nan")] * (most - len(row))] for row in rows]
    return Grid(trace.layers, [str(expert) for expert in range(most)], padded, "expert", "", "branches")


def _activation(trace: Trace) -> Grid:
    """The paper's figure 2 (b), over all steps."""
    values = [list(map(float, places)) for places in trace.activation]
    experts, places = ([str(i) for i in range(count)] for count in (len(values), trace.tokens))
    return Grid(experts, places, values, "token", "expert", "branches", title=trace.mapped_layer)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


FIGURES: dict[str, Callable[[Trace], Grid]] = {
    "match": _match,
    "reuse": _reuse,
    "tokens": _tokens,
    "drift": _drift,
    "routing": _routing,
    "activation": _activation,
}
_NO_BRANCHES = "cache steps of this recipe match no branches, or none was traced"
_WHY_EMPTY = {
    "match": _NO_BRANCHES,
    "reuse": _NO_BRANCHES,
    "tokens": "cache steps of this recipe recompute no tokens, or none was traced",
    "drift": "it takes two full steps of a generation",
    "routing": "no router has run in the traced steps",
    "activation": "how tokens lie in the picture is not known, or the router of the middle MoE layer has not run",
}
