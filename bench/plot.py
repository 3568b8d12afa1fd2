"""Plot what bench.speed measured, from the latest row of each case.

python -m bench.plot                            # docs/images/speed.png, step-split.png and compile-time-pays.png
python -m bench.plot --threads 1 --dtype bfloat16 --to /tmp/pictures

1. Speed-up of a generation over plain torch.compile, against the fraction recomputed, beside the speed-up in FLOPs.
2. Time of a cache step, by the ops that take it.
3. Seconds saved over plain torch.compile, less the extra seconds of compilation, against the steps sampled.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console

from bench.speed import COMPILED, PERIOD, RESULTS, SPLIT

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "images"
Row = Mapping[str, str]


def read(path: Path, keys: Sequence[str], threads: int, dtype: str) -> list[Row]:
    """The latest row of each case, in order of first appearance. Raises SystemExit where there are none."""
    latest: dict[tuple[str, ...], Row] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if (row["threads"], row["dtype"]) == (str(threads), dtype):
                    latest[tuple(row[key] for key in keys)] = row
    if not latest:
        raise SystemExit(f"{path} has no rows for {threads} threads and {dtype}: run `python -m bench.speed` first")
    return list(latest.values())


def fraction(row: Row) -> float:
    return float(row["way"].removeprefix("moeca "))


def allowed(row: Row) -> float:
    """The speed-up of a generation in FLOPs."""
    return PERIOD / (1 + (PERIOD - 1) * float(row["share"]))


def by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row)
    return found


def draw_speed(rows: Sequence[Row], axis: Any) -> None:
    generations = [row for row in rows if row["kind"] == "generation"]
    for model, points in by_model(generations).items():
        points = sorted(points, key=fraction)
        at = [fraction(row) for row in points]
        (line,) = axis.plot(at, [float(row["over_compile"]) for row in points], "o-", label=model)
        axis.plot(at, [allowed(row) for row in points], ":", color=line.get_color())
    axis.set(xlabel="fraction of the branches recomputed", ylabel="speed-up over torch.compile", ylim=(0, None))
    axis.plot([], [], "k:", label="what FLOPs allow")
    axis.grid(alpha=0.3)
    axis.legend()


def draw_split(rows: Sequence[Row], axis: Any) -> None:
    """Plot shares of a cache step's time, with its milliseconds in the label."""
    spent = {(row["model"], row["way"], row["part"]): float(row["milliseconds"]) for row in rows}
    parts, bars = (list(dict.fromkeys(found)) for found in ((k[2] for k in spent), (k[:2] for k in spent)))
    totals = [sum(spent.get((*bar, part), 0.0) for part in parts) for bar in bars]
    labels = [
        f"{model}, {Fraction(way.removeprefix('moeca ')).limit_denominator(64)}: {total:.0f} ms"
        for (model, way), total in zip(bars, totals, strict=True)
    ]
    before = [0.0] * len(bars)
    for part in parts:
        shares = [spent.get((*bar, part), 0.0) / total for bar, total in zip(bars, totals, strict=True)]
        axis.barh(labels, shares, left=before, label=part)
        before = [left + share for left, share in zip(before, shares, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="share of a cache step, by what spends it", xlim=(0, 1))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_compile(rows: Sequence[Row], axis: Any) -> None:
    """Plot seconds saved over steps sampled, less the extra seconds of compilation over plain torch.compile."""
    for model, of_model in by_model(rows).items():
        plain = next((row for row in of_model if row["way"] == COMPILED), None)
        ours = sorted((row for row in of_model if row["kind"] == "generation"), key=fraction)
        if plain is None or not ours:
            continue
        row = next((row for row in ours if fraction(row)), ours[0])
        # Of the moeca ways, only the first was compiled with an empty Inductor cache: the slowest.
        extra = max(float(each["cold_seconds"]) for each in ours) - float(plain["cold_seconds"])
        saved = (float(plain["milliseconds"]) - float(row["milliseconds"]) / PERIOD) / 1000
        label = f"{model}: pays from step {max(0, round(extra / saved))}" if saved > 0 else f"{model}: never pays"
        axis.plot([0, 400], [-extra, 400 * saved - extra], label=label)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="steps sampled", ylabel="seconds saved over torch.compile", xlim=(0, 400))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def picture(path: Path, draw: Callable[[Sequence[Row], Any], None], rows: Sequence[Row], columns: int = 1) -> None:
    """Save a picture of the rows: `draw` plots them on one axis, or on `columns` axes side by side."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(8 if columns == 1 else 11, 4), layout="constrained")
    draw(rows, axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="CSV", help=f"({RESULTS})")
    parser.add_argument("--split", type=Path, default=SPLIT, metavar="CSV", help=f"({SPLIT})")
    parser.add_argument("--threads", type=int, default=2, help="plot rows with this number of threads (2)")
    parser.add_argument("--dtype", default="float32", help="plot rows of this dtype (float32)")
    parser.add_argument("--to", type=Path, default=PICTURES, metavar="FOLDER", help=f"({PICTURES})")
    args = parser.parse_args(argv)
    rows = read(args.results, ("model", "way", "kind"), args.threads, args.dtype)
    parts = read(args.split, ("model", "way", "part"), args.threads, args.dtype)
    for name, draw, data in (
        ("speed.png", draw_speed, rows),
        ("step-split.png", draw_split, parts),
        ("compile-time-pays.png", draw_compile, rows),
    ):
        picture(args.to / name, draw, data)
        Console(highlight=False).print(f"{args.to / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
