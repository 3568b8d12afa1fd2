"""How the time of a step and the bytes of the caches grow with batch, tokens and experts.

python -m bench.growth
python -m bench.growth --question experts --repeats 9

The model is a DSMoE with width 192 and 4 blocks, two of them with experts. One of batch, tokens and experts varies;
the others stay at 4 samples, 256 tokens and 16 experts. A cache step recomputes 1/16 of the branches. Times are
medians over turns of one full and three cache steps. Rows are appended to a CSV file, and the latest row of each case
is plotted.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

import moeca_compile
from bench.plot import PICTURES, picture, read
from bench.speed import append, compiled, run_turn
from examples import families
from examples.families.dsmoe import DSMoESizes
from examples.machine import environment
from examples.testbed.arguments import whole_number

RESULTS = Path(__file__).resolve().parent / "results" / "growth.csv"
BASE = DSMoESizes(width=192, depth=4, heads=3, side=32, classes=10, experts=16, expert_width=384, top_k=2, scale=2.5)
QUESTIONS = {"batch": (1, 4, 8, 16, 32), "tokens": (64, 256, 576, 1024), "experts": (8, 16, 32, 64)}


def case(question: str, value: int) -> tuple[int, DSMoESizes]:
    """Batch and sizes, with `value` for the quantity that the question varies."""
    if question == "batch":
        return value, BASE
    if question == "tokens":
        return 4, replace(BASE, side=BASE.patch * round(value**0.5))
    return 4, replace(BASE, experts=value)


def measure(batch: int, sizes: DSMoESizes, repeats: int) -> dict[str, float]:
    """Milliseconds of a full and of a cache step, and MiB of caches."""
    model = families.assemble(families.FAMILIES["DSMoE"], sizes)
    inputs = families.inputs_for(model, batch=batch)
    way = compiled("moeca", model, {"recipe": "moeca", "budget": 1 / 16})
    with torch.no_grad():
        for turn in range(2 + repeats):
            way.turns.append(run_turn(way.call, inputs, turn))
    way.turns = way.turns[2:]  # the first turn compiles, the second may still allocate
    return {
        "full_ms": round(median(way.milliseconds("full")), 2),
        "cache_ms": round(median(way.milliseconds("cache")), 2),
        "cache_mib": round(moeca_compile.report(way.call).cache_bytes / 2**20, 3),
    }


def rows_of(
    questions: Sequence[str], repeats: int, where: Mapping[str, Any], console: Console
) -> Iterator[dict[str, Any]]:
    for question in questions:
        for value in QUESTIONS[question]:
            row = {"question": question, "value": value, **measure(*case(question, value), repeats)}
            console.print(
                "  {question} {value}: full {full_ms} ms, cache {cache_ms} ms, {cache_mib} MiB".format(**row)
            )
            yield {**row, "repeats": repeats, **where}


def draw(rows: Sequence[Mapping[str, str]], figure_axes: Sequence[Any]) -> None:
    """Plot each quantity relative to its value at the smallest size, beside a dotted line for linear growth."""
    for axis, question in zip(figure_axes, QUESTIONS, strict=True):
        points = sorted((row for row in rows if row["question"] == question), key=lambda row: int(row["value"]))
        at = [int(row["value"]) for row in points]
        for column, label in (("full_ms", "full step"), ("cache_ms", "cache step"), ("cache_mib", "cache bytes")):
            first = float(points[0][column]) if points else 1.0
            axis.plot(at, [float(row[column]) / first for row in points], "o-", label=label)
        if at and question != "experts":
            axis.plot(at, [value / at[0] for value in at], "k:", label="linear")
        axis.set(xlabel=question, ylabel=f"times that at {at[0]}" if at else "", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--question", action="append", choices=QUESTIONS, help="several times (all)")
    parser.add_argument("--repeats", type=whole_number(1), default=5, help="turns of four steps (5)")
    parser.add_argument("--threads", type=whole_number(1), default=2, help="threads of torch (2)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="CSV", help=f"({RESULTS})")
    parser.add_argument("--to", type=Path, default=PICTURES, metavar="FOLDER", help=f"({PICTURES})")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # torch warns at every compilation
    where = environment(torch.device("cpu"), torch.float32)
    for row in rows_of(args.question or list(QUESTIONS), args.repeats, where, Console(highlight=False)):
        append([row], args.out)
    rows = read(args.out, ("question", "value"), args.threads, "float32")
    picture(args.to / "growth.png", draw, rows, columns=len(QUESTIONS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
