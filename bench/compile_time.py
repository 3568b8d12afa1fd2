"""How long a model takes until it is compiled: plain torch.compile and moeca, cold, warm, and at another batch size.

python -m bench.compile_time                                # DSMoE-S-E16, three times; see --help for other models
python -m bench.compile_time --model DiT-MoE-S --one-size   # without the other batch sizes
python -m bench.compile_time --plot                         # docs/images/compile-time.png from the rows at hand

Each start is a process of its own, which imports torch and builds the model before the clock starts. A cold one has
an empty cache directory, the warm one after it has what the cold one left. The ways take turns, so that a busy
machine affects all alike; `cpu` counts the processor's seconds of the process and of the compilers that it started.

full     until the first step is done, which is a full one
cache    from there until the first cache step is done
another  a full and a cache step at another batch size
third    the same at a third one
more     one more kind of cache step, where the recipe has several: another number of recomputed tokens
ours     the part of our own code in `full` and `cache`: matching, validation, planning, rewriting, without lowering

Rows are appended to bench/results/compile_time.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
from rich.console import Console
from torch import nn

from bench.speed import append
from examples import families
from examples.machine import environment
from examples.testbed.arguments import whole_number

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "compile_time.csv"
PICTURE = ROOT / "docs" / "images" / "compile-time.png"
WAYS: Mapping[str, Mapping[str, Any] | None] = {
    "torch.compile": None,
    "auto": {},
    "moeca 0.0625": {"recipe": "moeca", "budget": 1 / 16},
    "moeca": {"recipe": "moeca"},
}
STEPS = ("full", "cache", "another", "third", "more")
OURS = ("match", "validate", "plan", "rewrite")
_UNTIL_CACHED = 3
"""The direction of time is known at the second step, so the third is the first cache step."""


def _clock() -> tuple[float, float]:
    return time.perf_counter(), sum(os.times()[:4])


def start(name: str, way: str, batch: int, one_size: bool = False) -> dict[str, float]:
    """In a process of its own: seconds until each kind of step has run once, less those of a step that is ready."""
    import moeca_compile

    options = WAYS[way]
    model = families.reduced("DSMoE") if name == "tiny" else families.build(name)
    compiled = torch.compile(model) if options is None else torch.compile(model, backend="moeca", options=options)
    found: dict[str, float] = {}

    def timed(step: str, count: int, samples: int, since: int) -> None:
        x, t, y = families.inputs_for(model, batch=samples)
        before = _clock()
        for number in range(since, since + count):
            compiled(x, t - number, y)
        wall, cpu = (after - first for after, first in zip(_clock(), before, strict=True))
        found[step], found[f"{step}_cpu"] = wall, cpu

    with torch.no_grad():
        timed("full", 1, batch, 0)
        timed("cache", _UNTIL_CACHED - 1, batch, 1)
        if options is not None:
            stages = moeca_compile.report(compiled).compile_seconds
            found["ours"] = sum(stages.get(stage, 0.0) for stage in OURS)
        if options is not None and _take_another_kind(model):
            timed("more", 1, batch, _UNTIL_CACHED)
        for number, step in enumerate(() if one_size else ("another", "third"), start=1):
            timed(step, _UNTIL_CACHED, batch + number, number * _UNTIL_CACHED + 1)
    return found


def _take_another_kind(model: nn.Module) -> bool:
    """Have the next cache step recompute another number of tokens. Returns whether the recipe has several."""
    from moeca_compile.runtime.record import find_record

    record = find_record(None, model)
    for loop in (loop for engine in record.engines for loop in engine.loops.values()):
        others = [c for c in loop.compiled.plan.capacities if c not in {kind.capacity for kind in loop.steps}]
        for stream in loop.streams.held() if others else ():
            stream.capacity = others[0]
            return True
    return False


def in_a_process(name: str, way: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The same, with this folder for all caches."""
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": str(args.threads)}
    given = ["--start", way, "--model", name, "--batch", str(args.batch), *["--one-size"] * args.one_size]
    command = [sys.executable, "-m", "bench.compile_time", *given]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, ways: Sequence[str], args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Rows with the medians over all repeats."""
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(args.repeats):
        for way in ways:
            with tempfile.TemporaryDirectory() as folder:
                for state in ("cold", "warm"):
                    found = in_a_process(name, way, args, Path(folder))
                    runs.setdefault((way, state), []).append(found)
                    shown = ", ".join(f"{step} {value:.1f}" for step, value in found.items())
                    console.print(f"  {way}, {state}: {shown}")
    where = environment(torch.device("cpu"), torch.float32) | {"threads": args.threads}
    columns = [*(f"{step}{unit}" for step in STEPS for unit in ("", "_cpu")), "ours"]
    return [
        {"model": name, "batch": args.batch, "way": way, "state": state}
        | {column: round(median(run.get(column, 0.0) for run in found), 2) for column in columns}
        | {"repeats": len(found), **where}
        for (way, state), found in runs.items()
    ]


def plot(path: Path, picture: Path) -> None:
    """Bars of the latest run's rows: processor seconds over those of plain torch.compile's cold start."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["way"], row["state"]) == ("torch.compile", "cold"):  # a new run, perhaps on another machine
                rows = {key: old for key, old in rows.items() if key[0] != row["model"]}
            rows[row["model"], row["way"], row["state"]] = row
    models = list(dict.fromkeys(model for model, _, _ in rows))
    wide, high = min(2, len(models)), -(-len(models) // 2)
    figure, axes = plt.subplots(high, wide, figsize=(5 * wide, 2.2 * high + 1), squeeze=False, layout="constrained")
    for axis in axes.flat[len(models) :]:
        axis.set_axis_off()
    for model, axis in zip(models, axes.flat, strict=False):
        base = sum(float(rows[model, "torch.compile", "cold"][step]) for step in ("full_cpu", "cache_cpu"))
        names = [(way, state) for known, way, state in rows if known == model]
        left = [0.0] * len(names)
        for step, label in (("full_cpu", "first step"), ("cache_cpu", "first cache step")):
            values = [float(rows[(model, *name)][step]) / base for name in names]
            axis.barh([" ".join(reversed(name)) for name in names], values, left=left, label=label)
            left = [one + other for one, other in zip(left, values, strict=True)]
        axis.invert_yaxis()
        axis.set_title(model)
        axis.set_xlabel("processor seconds over plain torch.compile, cold")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(picture, dpi=110)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", action="append", choices=[*families.PUBLISHED, "tiny"], help="(DSMoE-S-E16)")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="several times (all)")
    parser.add_argument("--batch", type=whole_number(1), default=4, help="samples (4)")
    parser.add_argument("--one-size", action="store_true", help="leave out the other batch sizes")
    parser.add_argument("--repeats", type=whole_number(1), default=3, help="starts of each kind (3)")
    parser.add_argument("--threads", type=whole_number(1), default=2, help="threads of torch (2)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="CSV", help=f"({RESULTS})")
    parser.add_argument("--plot", action="store_true", help="measure nothing, and draw the latest rows")
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="PNG", help=f"({PICTURE})")
    parser.add_argument("--start", choices=list(WAYS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse_arguments(argv), Console(highlight=False)
    models = args.model or ["DSMoE-S-E16"]
    if args.start:
        print(json.dumps(start(models[0], args.start, args.batch, args.one_size)))
    elif args.plot:
        plot(args.out, args.picture)
    else:
        for name in models:
            console.print(f"{name}, batch {args.batch}")
            append(measure(name, args.way or list(WAYS), args, console), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
