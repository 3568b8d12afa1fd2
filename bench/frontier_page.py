"""The table and the picture of what bench.frontier measured.

python -m bench.frontier_page                       # a Markdown table, and docs/images/frontier-digits.png
python -m bench.frontier_page --testbed mnist --to /tmp/pictures
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from bench.frontier import INTERVALS, Row, interval_of, results_of, way_of
from bench.study import TESTBEDS
from examples.digits.testbed import DIGITS

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "images"
OURS = "auto"
AS_FAST = 0.97
"""An opponent is as fast as another way where it has so much of its speed-up: some bring 0.01 less at equal steps."""


class Cell(NamedTuple):
    """`auto` at one speed-up, and the opponent that is nearest to the uncached pictures, at that speed-up or more."""

    panel: str
    every: int
    ours: Row
    opponent: Row | None

    @property
    def lead(self) -> float:
        """How many dB `auto` is ahead, by the mean over pictures; inf without an opponent."""
        return _number(self.ours, "psnr") - _number(self.opponent, "psnr") if self.opponent else float("inf")

    @property
    def error(self) -> float:
        """Its standard error, as if the two had other pictures: an upper bound, since they have the same."""
        return sum(_number(row, "psnr_error") ** 2 for row in (self.ours, self.opponent) if row) ** 0.5


def read(path: Path) -> list[Row]:
    """All rows. Raises SystemExit where there are none."""
    if not path.exists():
        raise SystemExit(f"{path} does not exist: run `python -m bench.frontier` first")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cells(rows: Sequence[Row]) -> list[Cell]:
    """One for each panel and speed-up that `auto` was measured at."""
    return [Cell(row["panel"], interval_of(row), row, _strongest(row, rows)) for row in rows if way_of(row) == OURS]


def _strongest(ours: Row, rows: Sequence[Row]) -> Row | None:
    least = AS_FAST * _number(ours, "flops_speedup")
    opponents = [
        row
        for row in rows
        if row["panel"] == ours["panel"] and way_of(row) != OURS and _number(row, "flops_speedup") >= least
    ]
    return max(opponents, key=lambda row: _number(row, "psnr"), default=None)


def table(found: Sequence[Cell]) -> Iterator[str]:
    """Lines of Markdown: a line for each panel, with `auto` and the strongest opponent at each speed-up."""
    yield "| | " + " | ".join(f"N = {every}" for every in INTERVALS) + " |"
    yield "|---" * (len(INTERVALS) + 1) + "|"
    for panel in dict.fromkeys(cell.panel for cell in found):
        at = {cell.every: cell for cell in found if cell.panel == panel}
        yield f"| {panel} | " + " | ".join(_text(at.get(every)) for every in INTERVALS) + " |"


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    ours, other = f"{_number(cell.ours, 'psnr'):.1f}", cell.opponent
    if other is None:
        return f"**{ours}**"
    theirs = f"{_number(other, 'psnr'):.1f}"
    best, worse = (f"**{ours}**", theirs) if cell.lead > 0 else (ours, f"**{theirs}**")
    return f"{best}; {worse} {way_of(other)}"


def behind(found: Sequence[Cell]) -> Iterator[str]:
    """A line for each cell in which `auto` is not ahead."""
    for cell in found:
        if cell.opponent is not None and cell.lead <= 0:
            speed = _number(cell.ours, "flops_speedup")
            text = f"{-cell.lead:.1f} dB (± {cell.error:.1f}) behind {way_of(cell.opponent)}"
            yield f"- {cell.panel}, N = {cell.every}, {speed:.1f}x: {text}"


def _number(row: Row, name: str) -> float:
    return float(row[name] or 0)


# --- the picture ----------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path) -> None:
    """Save one panel for each sampler and guidance: the mean PSNR of each way over its speed-up in FLOPs.

    A panel that was run at one speed-up alone makes no curve: it is in the table.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    run_at: dict[str, set[int]] = {}
    for row in rows:
        run_at.setdefault(row["panel"], set()).add(interval_of(row))
    names = [name for name, intervals in run_at.items() if len(intervals) > 1] or list(run_at)
    ways = list(dict.fromkeys(way_of(row) for row in rows))
    high = -(-len(names) // 2)
    figure, axes = pyplot.subplots(high, 2, figsize=(10, 3.4 * high), layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        _draw_panel(axis, name, [row for row in rows if row["panel"] == name], ways)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    handles = {
        label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_panel(axis: Any, name: str, rows: Sequence[Row], ways: Sequence[str]) -> None:
    for index, way in enumerate(ways):
        points = sorted((_number(row, "flops_speedup"), _number(row, "psnr")) for row in rows if way_of(row) == way)
        if points:
            style = {"color": "black", "linewidth": 2.5} if way == OURS else {"color": f"C{index - 1}"}
            dashes = "--" if way.startswith("fewer") else "-"
            axis.plot(*zip(*points, strict=True), dashes, marker="o", markersize=3, label=way, **style)
    axis.set(title=name, xlabel="times fewer FLOPs", ylabel="PSNR, dB")
    axis.grid(alpha=0.3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--testbed", choices=list(TESTBEDS), default=DIGITS.name, help="(digits)")
    parser.add_argument("--results", type=Path, metavar="CSV", help=f"({results_of(DIGITS)}, or that of the testbed)")
    parser.add_argument("--to", type=Path, default=PICTURES, metavar="FOLDER", help=f"({PICTURES})")
    args = parser.parse_args(argv)
    rows = read(args.results or results_of(TESTBEDS[args.testbed]))
    found, picture = cells(rows), args.to / f"frontier-{args.testbed}.png"
    draw(rows, picture)
    print("\n".join((*table(found), "", *behind(found), "", str(picture))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
