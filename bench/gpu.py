"""All GPU measurements in one call of less than ten minutes, without network access.

python -m bench.gpu                                              # all sections, the most important first
python -m bench.gpu --minutes 9 --section speed --model DiT-MoE-XL --batch 8
python -m bench.gpu --device cpu --tiny                          # tries the script itself, without a GPU

ops         each kernel of the package against its ATen reference on the device, and one run against another
kernels     grouped products against a dense product of as many FLOPs and torch's grouped_mm; row work against a copy
generation  a generation with CUDA graphs against one that runs op by op; copies to the host, waits and launches of a
            cache step
speed       steps of the published models at N = 4 against torch.compile and eager: time, the host's part of it, until
            ready, memory, and the error of a full step

Every part runs in a process of its own. `ops` and `kernels` are alone on the device; then the ways of running a model
are compiled side by side and measured one after another.

Rows are appended to a CSV file as they are measured. At the end it prints a table, each target beside its figure, and
what it skipped for lack of time. Exit status: 0; 1 where something failed or a result is wrong; 2 without CUDA.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.gpu_sections import generation, kernels, ops, speed
from bench.gpu_sections.common import FAILED, TINY, WRONG, Bench, Budget, Row, Settings
from bench.gpu_sections.processes import Job, run_alone, run_side_by_side
from bench.gpu_sections.targets import BATCH, MODEL, Target, targets
from examples import families
from examples.machine import environment, installed

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.csv"
ALONE: dict[str, Callable[[Bench], Iterator[None]]] = {"ops": ops.run, "kernels": kernels.run}
"""Sections that have the device to themselves, before all others."""

SECTIONS = (*ALONE, "generation", "speed")
MODELS = (MODEL, "DSMoE-L-E48", "DiT-MoE-XL", "DSMoE-S-E48", "DSMoE-S-E16")
BATCHES = (BATCH,)
READY = 240.0
"""Most seconds until the ways of a model are ready."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
NO_CUDA = (
    "There is no CUDA device here, so nothing was measured. Run this on a machine with an NVIDIA GPU, its driver, a "
    "torch that was built for CUDA (python -c 'import torch; print(torch.version.cuda)' must not print None) and "
    "Triton, from the root of this repository: python -m bench.gpu"
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=positive, default=9.0, help="time limit in minutes (9)")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="several times (all)")
    parser.add_argument("--model", action="append", choices=[*families.PUBLISHED, TINY], help="several times (five)")
    parser.add_argument("--batch", action="append", type=int, help="samples; several times (32)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, without Inductor: tries the script")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="(bfloat16)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the script (cuda)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="CSV", help=f"({RESULTS})")
    return parser.parse_args(argv)


def positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return number


def main(argv: list[str] | None = None) -> int:
    args, console = parse_arguments(argv), Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    if args.device == "cuda" and not torch.cuda.is_available():
        console.print(NO_CUDA, soft_wrap=True)
        return 2
    settings = settings_of(args)
    where = {**environment(settings.device, settings.dtype), "triton": installed("triton")}
    where["cuda"] = torch.version.cuda or ""
    rows: list[Row] = []

    def emit(row: Row) -> None:
        rows.append(row)
        append(row, where, args.out)
        console.print(
            f"  {row.section}: {row.what} {row.step} {number(row.value)} {row.unit} {row.note}", soft_wrap=True
        )

    budget = Budget(60 * args.minutes)
    run(settings, args.section or SECTIONS, budget, emit)
    console.print(table(rows, f"{where['device']}, torch {where['torch']}, triton {where['triton']}, {args.dtype}"))
    console.print(target_table(targets(rows, settings.models[0], settings.batches[0])))
    for text in budget.left_out:
        console.print(f"left out: {text}", soft_wrap=True)
    bad = [row for row in rows if row.note.startswith((FAILED, WRONG))]
    console.print(f"{len(rows)} rows, {len(bad)} wrong or failed")
    return 1 if bad or not rows else 0


def settings_of(args: argparse.Namespace) -> Settings:
    device = torch.device(args.device)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # in the processes that are started
    models, batches = args.model or ([TINY] if args.tiny else MODELS), args.batch or ([2] if args.tiny else BATCHES)
    return Settings(device, DTYPES[args.dtype], tuple(models), tuple(batches), small=args.tiny)


def run(settings: Settings, sections: Sequence[str], budget: Budget, emit: Callable[[Row], None]) -> None:
    """Run what there is time for, the most important first."""
    for name in (name for name in ALONE if name in sections):
        if budget.allows(name, 10):
            run_alone(Job(name, name, "", ALONE[name], settings), budget, emit)
    for what, jobs in tables(settings, sections):
        if budget.allows(what, 10 if settings.small else 60):
            run_side_by_side(jobs, budget, emit, READY)


def tables(settings: Settings, sections: Sequence[str]) -> Iterator[tuple[str, list[Job]]]:
    """What is compiled side by side: the ways of a model at a batch, beside the first of them the generations."""
    others = generation.jobs(settings) if "generation" in sections else []
    if "speed" not in sections and others:
        yield "generation", others
        return
    for batch in settings.batches if "speed" in sections else ():
        for name in settings.models:
            yield f"{name}, batch {batch}", [*speed.jobs(settings, name, batch), *others]
            others = []


def append(row: Row, where: Mapping[str, Any], path: Path) -> None:
    """Append a row to the CSV file, with a header if the file is new."""
    values = {**dataclasses.asdict(row), "when": datetime.now(timezone.utc).isoformat(timespec="seconds"), **where}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(values), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(values)


def table(rows: Sequence[Row], title: str) -> Table:
    found = Table(title=title, box=None, title_justify="left")
    for name in ("section", "what", "batch", "step", "value", "ratio", "note"):
        found.add_column(name, justify="right" if name in ("batch", "value", "ratio") else "left", overflow="fold")
    for row in rows:
        ratio = f"{float(row.ratio):.2f}x {row.against}" if row.ratio != "" else ""
        found.add_row(
            row.section, row.what, str(row.batch), row.step, f"{number(row.value)} {row.unit}", ratio, row.note
        )
    return found


def target_table(found: Sequence[Target]) -> Table:
    shown = Table(title="targets", box=None, title_justify="left")
    for name in ("target", "figure", ""):
        shown.add_column(name, overflow="fold")
    for each in found:
        limit = f"{each.what}: {'at most' if each.at_most else 'at least'} {each.limit:g}"
        shown.add_row(limit, f"{each.figure:.3g}", each.verdict)
    return shown


def number(value: float) -> str:
    """Counts as they are, small errors with an exponent, times with three digits or more."""
    if value == int(value) if value == value else False:
        return str(int(value))
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
