"""How close each recipe comes to the uncached pictures at each speed-up in FLOPs, by sampler and guidance.

python -m bench.frontier
python -m bench.frontier --testbed mnist --panel euler-50-1 --every 3 --every 5 --way auto --way stack-forecast

A panel is a sampler with its number of steps and its guidance. In each, `auto` and its opponents have full steps
every 2nd to every 6th step; among the opponents are as many uncached steps of the same sampler and of DPM-Solver++.
Steps run eagerly (bench.study), so FLOPs are measured and times are not. Rows go to a CSV file; a case that it
holds already, from the same sources and environment, does not run again. bench.frontier_page makes table and picture.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.study import (
    RESULTS,
    Case,
    Setting,
    Study,
    add_study_arguments,
    described,
    fingerprint,
    rounded,
    run_case,
    settle,
)
from examples.machine import environment
from examples.testbed.arguments import whole_number
from examples.testbed.checkpoint import CheckpointError
from examples.testbed.sampling import DETERMINISTIC
from examples.testbed.testbed import Testbed

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("moeca_compile", "examples/dit.py", "examples/testbed", "bench/study.py")
"""What a row depends on besides its options, the checkpoint and the environment."""
INTERVALS = (2, 3, 4, 5, 6)
LONG = 100
"""From so many steps on, a panel has fewer pictures and opponents."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """One sampler with guidance, and how many pictures its cases generate."""

    sampler: str
    steps: int
    guidance: float
    images: int

    @property
    def name(self) -> str:
        return f"{self.sampler}-{self.steps}-{self.guidance:g}"

    @property
    def setting(self) -> Setting:
        # Distributions would take hundreds of pictures: docs/policies.md has them.
        return Setting(self.sampler, self.images, sets=1, other_seeds=False, converged=self.steps < LONG)


def panels(images: int = 20, images_of_long: int = 4) -> tuple[Panel, ...]:
    """Euler, DPM-Solver++ and DDPM, without guidance and with much."""
    samplers = (("euler", 50, images), ("multistep", 50, images), ("euler", 250, images_of_long))
    of_all = (*samplers, ("ddpm", 250, images_of_long))
    return tuple(Panel(name, steps, scale, count) for name, steps, count in of_all for scale in (1.0, 3.0))


# --- cases ----------------------------------------------------------------------------------------------------

SHORT_WAYS: dict[str, dict[str, Any]] = {
    "stack-forecast": {"recipe": "stack-forecast"},
    "stack": {"recipe": "stack"},
    "fora": {"recipe": "fora"},
    "taylorseer": {"recipe": "taylorseer"},
    "toca": {"recipe": "toca"},
    "moeca, budget=0": {"recipe": "moeca", "budget": 0.0},
    "moeca, budget=1/16": {"recipe": "moeca", "budget": 1 / 16},
}
LONG_WAYS = ("stack-forecast", "fora", "taylorseer")
WAYS = ("auto", *SHORT_WAYS, "teacache", "fewer euler steps", "fewer multistep steps")
THRESHOLDS = {2: 0.06, 3: 0.11, 4: 0.16, 5: 0.21, 6: 0.26}
"""Of teacache, for about that speed-up on the digits testbed in 50 Euler steps."""


def cases(panel: Panel) -> Iterator[Case]:
    """`auto` first, then the opponents, at all speed-ups each."""
    deterministic = panel.sampler in DETERMINISTIC
    of_sampler = {"recipe": "auto", "sampler": "deterministic" if deterministic else "stochastic"}
    opponents = SHORT_WAYS if panel.steps < LONG else {name: SHORT_WAYS[name] for name in LONG_WAYS}
    for way, options in {"auto": of_sampler, **opponents}.items():
        for every in INTERVALS:
            yield Case(f"{way}, N = {every}", {**options, "full_every": every})
    if panel.steps < LONG and panel.sampler == "euler":
        for every, threshold in THRESHOLDS.items():
            yield Case(f"teacache, N = {every}", {"recipe": "teacache", "reuse_threshold": threshold})
    # A stochastic sampler draws other noise in fewer steps, so those are other pictures.
    for solver in sorted({panel.sampler, "multistep"}) if deterministic else ():
        for every in INTERVALS:
            steps = -(-panel.steps // every)
            yield Case(f"fewer {solver} steps, N = {every}", None, steps, solver)


def way_of(row: Row) -> str:
    """The recipe of a row, or the solver with fewer steps."""
    return str(row["case"]).rpartition(", N = ")[0]


def interval_of(row: Row) -> int:
    return int(str(row["case"]).rpartition("= ")[2])


# --- rows -----------------------------------------------------------------------------------------------------


class Rows:
    """The rows of a CSV file, one for each case of each panel.

    A row from other sources, another environment or another number of pictures stays until its case has run again.
    """

    def __init__(self, path: Path, where: Row) -> None:
        self.path, self.where, self.found = path, where, dict[tuple[str, str], Row]()
        if path.exists():
            with path.open(newline="") as file:
                self.found = {(row["panel"], row["case"]): row for row in csv.DictReader(file)}

    def has(self, panel: Panel, case: Case) -> bool:
        """Whether the case need not run."""
        row = self.found.get((panel.name, case.name))
        wanted = {**_given(panel, case), **self.where}
        return row is not None and all(row.get(name) == str(value) for name, value in wanted.items())

    def add(self, panel: Panel, case: Case, measured: Row) -> None:
        """Add a row, in the place of an older one of its case, and write the file."""
        row = {"panel": panel.name, "case": case.name, **_given(panel, case), **measured, **self.where}
        self.found[panel.name, case.name] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.found.values())
        partial.replace(self.path)


def _given(panel: Panel, case: Case) -> dict[str, Any]:
    return {
        "options": "" if case.options is None else described(case.options),
        "sampler": case.sampler or panel.sampler,
        "steps": case.steps or panel.steps,
        "guidance": panel.guidance,
        "images": panel.images,
    }


def sources_fingerprint(root: Path = ROOT, sources: Sequence[str] = SOURCES) -> str:
    """First digits of the SHA-256 of all Python files that a row depends on."""
    digest = hashlib.sha256()
    for source in sources:
        path = root / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def rows_of(args: argparse.Namespace) -> Rows:
    """The rows of the file that these arguments name, for what is measured as they say."""
    where = environment(args.device, torch.float32)
    return Rows(args.out, where | {"checkpoint": fingerprint(args.checkpoint), "sources": sources_fingerprint()})


def results_of(testbed: Testbed) -> Path:
    return RESULTS / f"frontier-{testbed.name}.csv"


# --- command line ---------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = [panel.name for panel in panels()]
    add_study_arguments(parser, results_of)
    parser.add_argument("--panel", action="append", choices=names, help="may be given several times (all)")
    parser.add_argument("--every", action="append", type=int, choices=INTERVALS, help="N, several times (all)")
    parser.add_argument("--way", action="append", choices=WAYS, help="a recipe, or fewer steps; several times (all)")
    parser.add_argument("--images", type=whole_number(2), default=20, help="pictures by a case of 50 steps (20)")
    parser.add_argument("--images-of-long", type=whole_number(2), default=4, help="and by one of 250 steps (4)")
    args = parser.parse_args(argv)
    settle(args, results_of)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    try:
        args.testbed.load_model(args.checkpoint)
    except CheckpointError as error:
        print(f"frontier.py: {error}", file=sys.stderr)
        return 1
    rows = rows_of(args)
    converged: dict[float, Any] = {}
    for panel in panels(args.images, args.images_of_long):
        if not args.panel or panel.name in args.panel:
            study = Study(args.testbed, args.checkpoint, panel.steps, panel.guidance, args.device)
            study.converged = converged.setdefault(panel.guidance, study.converged)
            measure(panel, [case for case in cases(panel) if _is_chosen(case, args)], study, rows)
    print(f"wrote {args.out}")
    return 0


def _is_chosen(case: Case, args: argparse.Namespace) -> bool:
    row = {"case": case.name}
    return (not args.every or interval_of(row) in args.every) and (not args.way or way_of(row) in args.way)


def measure(panel: Panel, chosen: Sequence[Case], study: Study, rows: Rows) -> None:
    """Run the cases that have no row yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns at every compilation
        for case in chosen:
            if not rows.has(panel, case):
                scores, costs = run_case(study, panel.setting, case)
                measured = {name: rounded(value) for name, value in (asdict(scores) | asdict(costs)).items()}
                rows.add(panel, case, measured)
                print(f"{panel.name}: {case.name}: {scores.psnr:.1f} dB at {costs.flops_speedup:.2f}x", flush=True)


if __name__ == "__main__":
    sys.exit(main())
