"""The picture of the comparison: PSNR over the speed-up, a panel a subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from bench.peer_sections.page import speed
from bench.peer_sections.subjects import SUBJECTS
from bench.peer_sections.ways import CACHE_DIT, DIFFUSERS, OURS

COLORS = {OURS: "C0", CACHE_DIT: "C1", DIFFUSERS: "C2"}
MARKERS = {OURS: "o", CACHE_DIT: "s", DIFFUSERS: "^"}
EQUAL_DB = 100.0
"""From here on the pictures are those of the uncached model up to rounding; drawn at the top."""

Row = Mapping[str, str]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Save the picture of all rows that have figures."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in SUBJECTS if any(row["subject"] == name and row["psnr"] for row in rows)]
    if not names:
        return
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(4.2 * len(names) + 1, 4.4), layout="constrained", squeeze=False
    )
    for name, axis in zip(names, axes[0], strict=True):
        panel(name, [row for row in rows if row["subject"] == name and row["psnr"] and row["status"] == "ran"], axis)
    axes[0][0].set_ylabel("PSNR to the uncached pictures, dB")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def panel(name: str, rows: Sequence[Row], axis: Any) -> None:
    """Points by tool, filled where torch.compile is part of the way."""
    for tool in COLORS:
        for compiled in (True, False):
            points = sorted(_points(rows, tool, compiled))
            style = {"color": COLORS[tool], "marker": MARKERS[tool], "linestyle": "-" if tool == OURS else ""}
            label = f"{tool}{'' if compiled else ', eager'}"
            if tool != OURS or compiled:
                axis.plot(*_columns(points), label=label, **style, fillstyle="full" if compiled else "none")
    for row in rows:
        if row["tool"] in COLORS and not row["way"].endswith(", compiled"):
            at = speed(row), min(EQUAL_DB, float(row["psnr"]))
            name_of = row["way"].removeprefix(f"{row['tool']} ").removeprefix("moeca ")
            axis.annotate(name_of, at, xytext=(4, 4), textcoords="offset points", fontsize=6)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    timed = any(row["over_compile_cpu"] for row in rows)
    across = "speed-up over torch.compile, processor time" if timed else "steps over full steps (not timed)"
    axis.set(title=name, xlabel=across, xlim=(0, 1.3 * max(map(speed, rows))))
    axis.grid(alpha=0.3)


def _points(rows: Sequence[Row], tool: str, compiled: bool) -> list[tuple[float, float]]:
    return [
        (speed(row), min(EQUAL_DB, float(row["psnr"])))
        for row in rows
        if row["tool"] == tool and row["full_steps"] and _compiled(row) == compiled
    ]


def _compiled(row: Row) -> bool:
    return row["tool"] == OURS or row["way"].endswith(", compiled")


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
