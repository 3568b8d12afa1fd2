"""All GPU measurements in one call of less than ten minutes, without network access.

python -m bench.gpu                                              # all sections, the most important first
python -m bench.gpu --minutes 9 --section speed --model DiT-MoE-XL --batch 8
python -m bench.gpu --device cpu --model tiny --minutes 2        # tries the script itself, without a GPU

ops         each op of the package against its ATen reference on the device, and one run against another
generation  a generation with CUDA graphs against one that runs op by op; copies to the host, waits and launches of a
            cache step
kernels     grouped products against a dense product of as many FLOPs and torch._grouped_mm; row work against a copy
speed       steps of the published models in bfloat16 against torch.compile and eager, at N = 4

Rows are appended to a CSV file as they are measured. At the end it prints a table, and what it skipped for lack of
time. Exit status: 0; 1 where a section failed or a result is wrong; 2 without CUDA.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.gpu_sections import generation, kernels, ops, speed
from bench.gpu_sections.common import FAILED, TINY, WRONG, Bench, Budget, OutOfTimeError, Row
from examples import families
from examples.machine import environment, installed

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.csv"
SECTIONS: dict[str, Callable[[Bench], None]] = {
    "ops": ops.run,
    "generation": generation.run,
    "kernels": kernels.run,
    "speed": speed.run,
}
MODELS = ("DSMoE-S-E16", "DSMoE-L-E16", "DSMoE-S-E48", "DSMoE-L-E48", "DiT-MoE-XL")
BATCHES = (8, 32, 1, 125)
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
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="several times (all)")
    parser.add_argument("--model", action="append", choices=[*families.PUBLISHED, TINY], help="several times (five)")
    parser.add_argument("--batch", action="append", type=int, help="samples; several times (8, 32, 1, 125)")
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
    rows: list[Row] = []
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    where = {**environment(device, dtype), "triton": installed("triton"), "cuda": torch.version.cuda or ""}

    def emit(row: Row) -> None:
        rows.append(row)
        append(row, where, args.out)
        console.print(
            f"  {row.section}: {row.what} {row.step} {number(row.value)} {row.unit} {row.note}", soft_wrap=True
        )

    models, batches = tuple(args.model or MODELS), tuple(args.batch or BATCHES)
    bench = Bench(device, dtype, Budget(60 * args.minutes), emit, models, batches, small=args.device == "cpu")
    warnings.simplefilter("ignore")  # the package's warnings are rows of the table
    failed = run_sections(bench, args.section or list(SECTIONS), console)
    console.print(table(rows, f"{where['device']}, torch {where['torch']}, triton {where['triton']}, {args.dtype}"))
    for text in bench.budget.left_out:
        console.print(f"left out: {text}", soft_wrap=True)
    bad = [row for row in rows if row.note.startswith((FAILED, WRONG))]
    console.print(
        f"{len(rows)} rows, {len(bad)} wrong or failed; sections that failed: {', '.join(failed) or 'none'}"
    )
    return 1 if failed or bad else 0


def run_sections(bench: Bench, names: Sequence[str], console: Console) -> list[str]:
    """Run the sections in order. Prints the traceback of one that fails and goes on. Returns the names of those."""
    failed = []
    for name in names:
        console.print(f"{name}, {bench.budget.left:.0f} s left")
        try:
            with bench.budget.enforced():
                SECTIONS[name](bench)
        except OutOfTimeError:
            bench.budget.left_out.append(f"the rest of {name}")
        except Exception:
            failed.append(name)
            console.print(traceback.format_exc(), markup=False)
    return failed


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


def number(value: float) -> str:
    """Counts as they are, small errors with an exponent, times with three digits or more."""
    if value == int(value) if value == value else False:
        return str(int(value))
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
