"""moeca_compile beside the tools that its users would take otherwise: cache-dit, diffusers' hooks, torch.compile.

python -m bench.peers                                       # everything: rows, table in docs/peers.md, picture
python -m bench.peers --subject digits --way cache-dit      # part of it
python -m bench.peers --subject nucleus --eager             # nothing is compiled: pictures and full steps, in minutes
python -m bench.peers --draw                                # tables and picture anew from the rows that are there

Needs `pip install -e ".[bench,peers]"`; the rows of a package that is not installed say so. Each way to sample runs
in a process of its own. Settings are measured one after another, their eager and compiled runs in turns with plain
torch.compile from the same seeds, so that drift of the machine affects both alike. Rows replace those of the same
subject and way in bench/results/peers.csv.

lines       of code that the user writes, counted from bench/peer_sections/code.py, as it is run
speed-ups   medians over the seeds of plain torch.compile's time over this way's, by the wall clock and in seconds of
            the processor, which other processes do not lengthen; with --eager over the uncached model in eager
PSNR        to the uncached model in eager from the same seeds, the mean over pictures and the worst picture
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from bench.live_bytes import LiveBytes
from bench.peer_sections.page import write_page
from bench.peer_sections.picture import draw
from bench.peer_sections.subjects import SUBJECTS, Subject
from bench.peer_sections.ways import COMPILED, EAGER, OURS, Way, groups, groups_in_eager
from bench.peer_sections.worker import Found, Generation, Worker
from examples.machine import environment, installed
from examples.testbed.arguments import whole_number

RESULTS = Path(__file__).resolve().parent / "results" / "peers.csv"
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "peers.png"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "peers.md"
EXACT_DB = 150.0
RAN, IDLE, RAISED, SKIPPED = "ran", "idle", "raised", "skipped"
NO_EFFECT = "the pictures equal those of the uncached model, and no step was skipped"


@dataclass
class Run:
    """A way with its generations, one a seed; those of the uncached model from the same seeds beside them."""

    way: Way
    failure: str
    found: Found
    generations: list[Generation] = field(default_factory=list)
    beside: list[Generation] = field(default_factory=list)


def measure(
    subject: Subject, uncached: tuple[Way, ...], chosen: Sequence[tuple[Way, ...]], seeds: Sequence[int]
) -> Iterator[Run]:
    """Run the groups of ways one after another, beside the last of `uncached`. The first run is that of the first."""
    first, last = uncached[0], uncached[-1]
    with Worker(subject, last) as baseline:
        beside = _Beside(baseline, {})
        if first is not last:
            yield from _group(subject, (first,), seeds, beside)
        else:
            for seed in seeds:
                beside.run(seed)
        yield Run(last, baseline.failure, baseline.found, beside.generations(seeds), beside.generations(seeds))
        for group in chosen:
            yield from _group(subject, group, seeds, beside)


@dataclass
class _Beside:
    """The uncached model that times are compared with, run anew beside each group."""

    worker: Worker
    last: dict[int, Generation]

    def run(self, seed: int) -> None:
        found = self.worker.generate(seed)
        if found is not None:
            self.last[seed] = found

    def generations(self, seeds: Sequence[int]) -> list[Generation]:
        return [self.last[seed] for seed in seeds if seed in self.last]


def _group(subject: Subject, group: tuple[Way, ...], seeds: Sequence[int], beside: _Beside) -> Iterator[Run]:
    with ExitStack() as stack:
        workers = {way: stack.enter_context(Worker(subject, way)) for way in group if not way.missing}
        done: dict[Way, list[Generation]] = {way: [] for way in workers}
        if not all(worker.failure for worker in workers.values()):
            for seed in seeds:
                beside.run(seed)
                for way, worker in workers.items():
                    found = worker.generate(seed)
                    done[way] += [] if found is None else [found]
        counted = next((worker.found.full_steps for worker in workers.values() if worker.found.full_steps), None)
        for way in group:
            if way.missing:
                yield Run(way, way.missing, Found())
                continue
            worker = workers[way]
            worker.found.full_steps = worker.found.full_steps or counted
            yield Run(way, worker.failure, worker.found, done[way], beside.generations(seeds))


# --- rows ---------------------------------------------------------------------------------------------------


def row_of(subject: Subject, run: Run, wanted: Sequence[Generation], eager: bool = False) -> dict[str, Any]:
    """A line of the CSV file; figures are empty where the way did not run to its end.

    In `eager` speed-ups are over the uncached model in eager, and ours has none: its steps run op by op then.
    """
    way, found = run.way, run.found
    status, reason = status_of(subject, run, wanted)
    row = {
        "subject": subject.name,
        "way": way.label,
        "tool": way.tool,
        "settings": way.settings,
        "status": status,
        "reason": reason,
        "lines": way.lines,
        "steps": subject.steps,
        "full_steps": subject.steps if way.tool in (EAGER, COMPILED) else found.full_steps,
        "graphs": found.graphs,
        "breaks": found.breaks,
        "recompiles": found.recompiles,
        "still_compiling": found.still_compiling,
    }
    measured = status in (RAN, IDLE)
    figures = _figures(subject, run, wanted, eager) if measured else {}
    return row | {name: figures.get(name, "") for name in FIGURES}


FIGURES = (
    "over_eager_cpu",
    "over_compile",
    "over_compile_cpu",
    "seconds",
    "cpu_seconds",
    "first_seconds",
    "psnr",
    "psnr_worst",
    "ssim",
    "peak_mib",
    "cache_mib",
)


def status_of(subject: Subject, run: Run, wanted: Sequence[Generation]) -> tuple[str, str]:
    """Whether a way ran, and did something; and why not."""
    if run.way.missing:
        return SKIPPED, run.failure
    if run.failure:
        return RAISED, run.failure
    if run.way.tool in (EAGER, COMPILED):
        return RAN, ""
    same = run.found.full_steps in (None, subject.steps)
    near = _psnr(subject, run.generations, wanted)
    return (IDLE, NO_EFFECT) if same and min(near) >= 100 else (RAN, "")


def _figures(subject: Subject, run: Run, wanted: Sequence[Generation], eager: bool) -> dict[str, Any]:
    near = _psnr(subject, run.generations, wanted)
    cache = run.found.cache_mib
    return _costs(run, eager) | {
        "psnr": round(mean(near), 2),
        "psnr_worst": round(min(near), 2),
        "ssim": round(_ssim(subject, run.generations, wanted), 4),
        "cache_mib": "" if cache is None else round(cache, 2),
    }


def _costs(run: Run, eager: bool) -> dict[str, Any]:
    if eager and run.way.tool == OURS:
        return {}
    pairs = list(zip(run.beside, run.generations, strict=True))
    wall = round(median(slow.seconds / fast.seconds for slow, fast in pairs), 3)
    cpu = round(median(slow.cpu_seconds / fast.cpu_seconds for slow, fast in pairs), 3)
    over = {"over_eager_cpu": cpu} if eager else {"over_compile": wall, "over_compile_cpu": cpu}
    return over | {
        "seconds": round(median(each.seconds for each in run.generations), 3),
        "cpu_seconds": round(median(each.cpu_seconds for each in run.generations), 3),
        "first_seconds": round(run.found.first_seconds, 2),
        "peak_mib": round(max(each.peak_mib for each in run.generations), 2),
    }


def _peak(subject: Subject, wanted: Sequence[Generation]) -> float:
    values = torch.cat([each.pictures.flatten() for each in wanted])
    return subject.peak or float(values.max() - values.min())


def _pairs(found: Sequence[Generation], wanted: Sequence[Generation]) -> Iterator[tuple[Tensor, Tensor]]:
    for one, other in zip(found, wanted, strict=True):
        yield from zip(one.pictures.double(), other.pictures.double(), strict=True)


def _psnr(subject: Subject, found: Sequence[Generation], wanted: Sequence[Generation]) -> list[float]:
    """Of each picture in dB, at most EXACT_DB."""
    peak = _peak(subject, wanted)
    errors = [float((one - other).square().mean()) for one, other in _pairs(found, wanted)]
    return [min(EXACT_DB, 10 * float(np.log10(peak**2 / max(error, 1e-30)))) for error in errors]


def _ssim(subject: Subject, found: Sequence[Generation], wanted: Sequence[Generation]) -> float:
    from skimage.metrics import structural_similarity

    peak = _peak(subject, wanted)
    return mean(
        float(structural_similarity(other.numpy(), one.numpy(), data_range=peak, channel_axis=0))
        for one, other in _pairs(found, wanted)
    )


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def replace_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows in place of those of the same subject and way; others stay, and all are by subject."""
    new = {(str(row["subject"]), str(row["way"])): row for row in rows}
    kept = [row for row in read(path) if (row["subject"], row["way"]) not in new]
    order = list(SUBJECTS)
    together = sorted([*kept, *new.values()], key=lambda row: order.index(row["subject"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        columns = dict.fromkeys(name for row in together for name in row)
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(together)


# --- the command --------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Where it was measured, and how many processes wanted a core in the last minute."""
    versions = {"cache-dit": installed("cache-dit"), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    return environment(torch.device("cpu"), torch.float32) | versions


def run_subject(
    subject: Subject, names: Sequence[str], seeds: Sequence[int], eager: bool
) -> Iterator[dict[str, Any]]:
    """Measure the ways whose names hold one of `names`, or all; a row as soon as it is there."""
    uncached, *every = (groups_in_eager if eager else groups)(subject)
    asked = (tuple(way for way in group if not names or any(name in way.label for name in names)) for group in every)
    wanted: list[Generation] = []
    for run in measure(subject, uncached, list(filter(None, asked)), seeds):
        wanted = wanted or run.generations  # of the uncached model in eager, which comes first
        yield row_of(subject, run, wanted, eager) | {"seeds": len(seeds), "images": subject.images, **machine()}


SHOWN = (
    "{way}: {status} {reason} {lines} lines, {full_steps} full, {over_compile_cpu}x in processor time,"
    " {over_compile}x by the clock, {psnr} dB"
)


def import_what_is_compared() -> None:
    """Before the processes of the ways fork off, so that none of them has to."""
    import logging

    import diffusers  # noqa: F401

    if find_spec("cache_dit"):
        import cache_dit  # noqa: F401

        logging.disable(logging.INFO)  # it tells every adapter that it makes
    LiveBytes(torch.device("cpu"))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--subject", action="append", choices=list(SUBJECTS), help="several times (all)")
    parser.add_argument("--way", action="append", metavar="PART", help="of a name; several times (all)")
    parser.add_argument("--seeds", type=whole_number(1), default=3, help="timed generations of each way (3)")
    parser.add_argument("--eager", action="store_true", help="compile nothing: no speed-ups over torch.compile")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="CSV", help=f"({RESULTS})")
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="PNG", help=f"({PICTURE})")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="MD", help=f"({PAGE})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse_arguments(argv), Console(highlight=False, markup=False)
    torch.set_num_threads(1)
    if not args.draw:
        import_what_is_compared()
        for name in args.subject or SUBJECTS:
            console.print(name)
            for row in run_subject(SUBJECTS[name], args.way or [], range(1, 1 + args.seeds), args.eager):
                console.print("  " + SHOWN.format(**row), soft_wrap=True)
                replace_rows(args.out, [row])
    rows = read(args.out)
    draw(rows, args.picture)
    write_page(rows, args.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
