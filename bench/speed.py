"""How long steps take on the published models: eager, plain torch.compile, and full and cache steps of ours.

python -m bench.speed                                        # all models, about ten minutes each on 2 cores
python -m bench.speed --model DSMoE-S-E16 --fraction 0 --fraction 0.0625 --repeats 5

A fraction is a rank budget: so much of a layer's branches is recomputed at every cache step, so that the work is the
same on every machine. Each way of running the model has a copy of its own and is compiled cold, in an empty cache of
Inductor's. Then all run in turn, four steps at a time (one full step and three cache steps of ours), so that drift
of the machine meets all of them alike. `over_compile` is the median of ratios within a turn: plain torch.compile's
step time over this one's. `share` is what the cost model says that this step's FLOPs are of a full step's.
Rows are added to a CSV file.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import moeca_compile
from examples import families
from examples.digits.arguments import whole_number
from examples.digits.compare import environment, private_copy

RESULTS = Path(__file__).resolve().parent / "results" / "speed.csv"
MODELS = ("DSMoE-S-E16", "DSMoE-S-E48", "DiT-MoE-S", "Diff-MoE-S", "DiffMoE-S-E16")
FRACTIONS = (0.0, 1 / 16, 1 / 8, 1 / 4)
PERIOD = 4
EAGER, COMPILED, UNCACHED = "eager", "torch.compile", "none"


@dataclass
class Way:
    """One way of running the model: how it is called, and the milliseconds of its calls by turn and step."""

    name: str
    call: Any
    compile_seconds: float = 0.0
    turns: list[list[float]] = field(default_factory=list)

    def milliseconds(self, cached: bool | None) -> list[float]:
        """A turn's median of full steps (False), cache steps (True) or all (None)."""
        part = slice(None) if cached is None else slice(1, None) if cached else slice(0, 1)
        return [median(turn[part]) for turn in self.turns]


def ways(model: nn.Module, fractions: Sequence[float]) -> list[Way]:
    ours = [(UNCACHED, {"recipe": "none"})]
    ours += [(f"moeca {fraction:g}", {"recipe": "moeca", "budget": fraction}) for fraction in fractions]
    found = [Way(EAGER, private_copy(model)), Way(COMPILED, torch.compile(private_copy(model)))]
    for name, options in ours:
        options = {**options, "full_every": PERIOD}
        found.append(Way(name, torch.compile(private_copy(model), backend="moeca", options=options)))
    return found


def run_turn(way: Way, inputs: tuple[Tensor, Tensor, Tensor], turn: int) -> list[float]:
    """Milliseconds of the steps of one period."""
    x, t, y = inputs
    times = []
    for step in range(PERIOD):
        at = t - (turn * PERIOD + step)
        start = time.perf_counter()
        way.call(x, at, y)
        times.append(1000 * (time.perf_counter() - start))
    return times


def measure(model: nn.Module, batch: int, fractions: Sequence[float], repeats: int, console: Console) -> list[Way]:
    """Compile every way, then let them take turns."""
    inputs = families.inputs_for(model, batch=batch)
    found = ways(model, fractions)
    with torch.no_grad():
        for way in found:
            with fresh_cache():
                warm = run_turn(way, inputs, 0)
                again = run_turn(way, inputs, 1)
            if way.name != EAGER:
                way.compile_seconds = (sum(warm) - sum(again)) / 1000
            console.print(f"  {way.name}: compiled in {way.compile_seconds:.1f} s")
        for turn in range(2, 2 + repeats):
            for way in found:
                way.turns.append(run_turn(way, inputs, turn))
    return found


def rows_of(name: str, batch: int, found: Sequence[Way], where: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each way and kind of step."""
    base = next(way for way in found if way.name == COMPILED).milliseconds(None)
    for way in found:
        caching = way.name not in (EAGER, COMPILED, UNCACHED)
        for cached in (False, True) if caching else (None,):
            times = way.milliseconds(cached)
            yield {
                "model": name,
                "batch": batch,
                "way": way.name,
                "step": {None: "", False: "full", True: "cache"}[cached],
                "milliseconds": round(median(times), 2),
                "over_compile": round(median(b / t for b, t in zip(base, times, strict=True)), 3),
                "share": round(cache_share(way), 4) if cached else "",
                "compile_seconds": round(way.compile_seconds, 1),
                "cache_mib": round(moeca_compile.report(way.call).cache_bytes / 2**20, 1) if caching else "",
                "repeats": len(times),
                **where,
            }


def cache_share(way: Way) -> float:
    """FLOPs of a cache step over those of a full step, as the report has them."""
    report = moeca_compile.report(way.call)
    assert report.flops is not None
    steps, full = sum(report.steps.values()), report.steps["full"]
    return (report.flops.mean_step / report.flops.full_step * steps - full) / (steps - full)


def keep(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Add the rows to the CSV file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", action="append", choices=[*families.PUBLISHED, "tiny"], help="several times (five)"
    )
    parser.add_argument(
        "--fraction", action="append", type=float, help="recomputed; several times (0, 1/16, 1/8, 1/4)"
    )
    parser.add_argument("--batch", type=whole_number(1), default=4, help="samples (4)")
    parser.add_argument("--repeats", type=whole_number(1), default=5, help="turns of four steps (5)")
    parser.add_argument("--threads", type=whole_number(1), default=2, help="threads of torch (2)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="CSV", help=f"({RESULTS})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse_arguments(argv), Console(highlight=False)
    torch.set_num_threads(args.threads)
    where = environment(torch.device("cpu"), torch.float32)
    warnings.simplefilter("ignore")  # torch's own, once a compilation
    for name in args.model or MODELS:
        model = families.reduced("DSMoE") if name == "tiny" else families.build(name)
        console.print(f"{name}, batch {args.batch}")
        found = measure(model, args.batch, args.fraction or FRACTIONS, args.repeats, console)
        rows = list(rows_of(name, args.batch, found, where))
        for row in rows:
            console.print("  {way} {step}: {milliseconds} ms, {over_compile}x, share {share}".format(**row))
        keep(rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
