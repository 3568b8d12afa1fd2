"""How long until the first picture, cold: steps that are compiled first, and steps that run while they are compiled.

python -m bench.first_picture                      # DSMoE-S-E16, three times; see --help for other models

Each start is a process of its own with an empty cache directory, which imports torch and builds the model before the
clock starts. The ways take turns. `cpu` counts the processor's seconds of the process and of the compilers that it
started, without those of the compile worker: what the clock would say where the worker has a core of its own.

first    until the first call has returned
picture  until all steps of the first picture have run
ready    until a picture is made by compiled steps alone, and how long that one takes (`last`)
total    the processor's seconds of all processes, from their start to their end

Rows are appended to bench/results/first_picture.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from bench.speed import append
from examples import families
from examples.machine import environment
from examples.testbed.arguments import whole_number

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "first_picture.csv"
OPTIONS: Mapping[str, Any] = {"recipe": "moeca", "budget": 1 / 16}
WAYS: Mapping[str, Mapping[str, Any] | None] = {
    "torch.compile": None,
    "compiled first": OPTIONS,
    "background": {**OPTIONS, "background": True},
}


def _clock() -> tuple[float, float]:
    return time.perf_counter(), sum(os.times()[:4])


def start(name: str, way: str, batch: int, steps: int) -> dict[str, float]:
    """In a process of its own: seconds until the first call, the first picture, and the first compiled one."""
    import moeca_compile

    options = WAYS[way]
    model = families.reduced("DSMoE") if name == "tiny" else families.build(name)
    compiled = torch.compile(model) if options is None else torch.compile(model, backend="moeca", options=options)
    x, t, y = families.inputs_for(model, batch=batch)
    began, found = _clock(), dict[str, float]()

    def note(what: str) -> None:
        found[what], found[f"{what}_cpu"] = (now - then for now, then in zip(_clock(), began, strict=True))

    def early() -> int:
        return 0 if options is None else sum(moeca_compile.report(compiled).early_runs.values())

    with torch.no_grad():
        while "ready" not in found:
            before, since = early(), time.perf_counter()
            for number in range(steps):
                compiled(x, t - number, y)
                if "first" not in found:
                    note("first")
            if "picture" not in found:
                note("picture")
            elif early() == before:
                found["last"] = time.perf_counter() - since
                note("ready")
    return found | {"early": early()}


def in_a_process(name: str, way: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The same, with this folder for all caches."""
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": str(args.threads)}
    command = [sys.executable, "-m", "bench.first_picture", "--start", way, "--model", name]
    command += ["--batch", str(args.batch), "--steps", str(args.steps)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"total": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def measure(name: str, args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Rows with the medians over all repeats."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in args.way or WAYS}
    for _ in range(args.repeats):
        for way, found in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                found.append(in_a_process(name, way, args, Path(folder)))
            shown = ", ".join(f"{what} {value:.1f}" for what, value in found[-1].items())
            console.print(f"  {way}: {shown}")
    where = environment(torch.device("cpu"), torch.float32) | {"threads": args.threads}
    return [
        {"model": name, "batch": args.batch, "steps": args.steps, "way": way}
        | {what: round(median(run[what] for run in found), 2) for what in found[0]}
        | {"repeats": len(found), **where}
        for way, found in runs.items()
    ]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", action="append", choices=[*families.PUBLISHED, "tiny"], help="(DSMoE-S-E16)")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="several times (all)")
    parser.add_argument("--batch", type=whole_number(1), default=1, help="samples (1)")
    parser.add_argument("--steps", type=whole_number(1), default=8, help="steps of a picture (8)")
    parser.add_argument("--repeats", type=whole_number(1), default=3, help="starts of each way (3)")
    parser.add_argument("--threads", type=whole_number(1), default=1, help="threads of torch (1)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="CSV", help=f"({RESULTS})")
    parser.add_argument("--start", choices=list(WAYS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse_arguments(argv), Console(highlight=False)
    models = args.model or ["DSMoE-S-E16"]
    if args.start:
        print(json.dumps(start(models[0], args.start, args.batch, args.steps)))
        return 0
    for name in models:
        console.print(f"{name}, batch {args.batch}")
        append(measure(name, args, console), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
