"""The experiments of MoECa's paper on a testbed, beside what the paper has.

python -m bench.paper                                  # all tables on digits; rows in bench/results/paper-digits.csv
python -m bench.paper --testbed mnist --table 3 --table 4
python -m bench.paper --show                           # the tables in Markdown, from the rows at hand

Steps run eagerly (bench.study): FLOPs are measured and times are not. A case that the CSV file holds already, from
the same sources and environment, does not run again.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.frontier import Panel, Row, measure, rows_of
from bench.study import RESULTS, Case, Study, add_study_arguments, settle
from examples.testbed.arguments import whole_number
from examples.testbed.checkpoint import CheckpointError
from examples.testbed.testbed import Testbed


@dataclass(frozen=True)
class PaperTable:
    """A table or figure of the paper.

    Attributes:
        number: its name in the paper.
        title: what it compares.
        steps, sampler: of the runs here; 250 in the paper.
        cases: the ways that are compared.
        theirs: the paper's values by case, as text: what `columns` names.
        columns: what these values are.
    """

    number: str
    title: str
    sampler: str
    steps: int
    cases: tuple[Case, ...]
    columns: tuple[str, ...] = ()
    theirs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


N = 4
"""Full steps every fourth step, as in the paper."""
_BUDGET = 1 / 8
_AS_FAST = {"euler": 0.04, "ddpm": 0.3}
"""Thresholds of TeaCache for about 2.5 times fewer FLOPs on digits; the paper's, 0.4, means something else there."""
_LARGE = 1e6
"""A weight beside which the others of eq. 9 do not count."""


def _moeca(name: str, **options: Any) -> Case:
    return Case(name, {"recipe": "moeca", "full_every": N, **options})


def _methods(sampler: str) -> tuple[Case, ...]:
    how = "deterministic" if sampler == "euler" else "stochastic"
    fewer = [Case(f"{share}% steps", None, round(2.5 * share), sampler) for share in (33, 37)]
    return (
        *fewer,
        Case("ToCa", {"recipe": "toca"}),
        Case("DuCa", {"recipe": "duca"}),
        Case("TeaCache", {"recipe": "teacache", "reuse_threshold": 0.4}),
        Case("TeaCache, about as fast", {"recipe": "teacache", "reuse_threshold": _AS_FAST[sampler]}),
        _moeca("MoECa"),
        _moeca("MoECa, nothing recomputed", budget=0.0),
        Case("auto", {"recipe": "auto", "full_every": N, "sampler": how}),
    )


def tables() -> tuple[PaperTable, ...]:
    quality = ("PSNR", "SSIM", "FID")
    return (
        PaperTable(
            "Table 1",
            "Methods on DSMoE (S-E48)",
            "euler",
            250,
            _methods("euler"),
            ("FLOPs", "FID", "PSNR", "SSIM"),
            {
                "33% steps": ("3.01x", "53.5", "28.09", "0.678"),
                "37% steps": ("2.69x", "49.9", "28.23", "0.685"),
                "ToCa": ("2.62x", "41.6", "29.09", "0.707"),
                "DuCa": ("2.65x", "41.3", "29.31", "0.714"),
                "TeaCache": ("2.28x", "40.9", "29.29", "0.710"),
                "MoECa": ("2.81x", "40.6", "29.45", "0.715"),
            },
        ),
        PaperTable(
            "Table 2",
            "Methods on DiT-MoE, a stochastic sampler",
            "ddpm",
            250,
            tuple(case for case in _methods("ddpm") if case.options is not None),  # fewer steps draw other noise
            ("FLOPs", "FID"),
            {
                "ToCa": ("1.94x", "31.4"),
                "DuCa": ("1.98x", "31.3"),
                "TeaCache": ("1.79x", "31.1"),
                "MoECa": ("2.13x", "30.8"),
            },
        ),
        PaperTable(
            "Table 3",
            "The expert-aware threshold (alpha of eq. 12)",
            "euler",
            50,
            tuple(_moeca(f"alpha = {alpha:g}", alpha=alpha) for alpha in (0.0, 0.4, 0.6, 0.8)),
            quality,
            {
                "alpha = 0": ("29.11", "0.708", "40.9"),
                "alpha = 0.4": ("29.38", "0.712", "40.7"),
                "alpha = 0.6": ("29.45", "0.715", "40.6"),
                "alpha = 0.8": ("29.29", "0.713", "40.7"),
            },
        ),
        PaperTable(
            "Table 4",
            "The parts of the score (eq. 9), each with an eighth of the branches recomputed",
            "euler",
            50,
            (
                _moeca("w", budget=_BUDGET, lambda1=0.0, lambda2=0.0),
                _moeca("drift", budget=_BUDGET, score="drift"),
                _moeca("contribution", budget=_BUDGET, lambda1=0.0, lambda2=_LARGE),
                _moeca("w + drift", budget=_BUDGET, lambda2=0.0),
                _moeca("w + contribution", budget=_BUDGET, lambda1=0.0),
                _moeca("drift + contribution", budget=_BUDGET, lambda1=_LARGE, lambda2=0.6 * _LARGE),
                _moeca("all", budget=_BUDGET),
            ),
            quality,
            {
                "w": ("28.80", "0.703", "41.7"),
                "drift": ("28.95", "0.706", "41.4"),
                "contribution": ("28.87", "0.705", "41.6"),
                "w + drift": ("29.46", "0.714", "40.7"),
                "w + contribution": ("29.16", "0.709", "41.0"),
                "drift + contribution": ("29.29", "0.712", "40.8"),
                "all": ("29.45", "0.715", "40.6"),
            },
        ),
        PaperTable(
            "Table 5",
            "The weights of drift and contribution",
            "euler",
            50,
            tuple(
                _moeca(f"lambda1 = {one:g}, lambda2 = {other:g}", lambda1=one, lambda2=other)
                for one in (0.5, 1.0, 1.5)
                for other in (0.1, 0.6, 1.1)
            ),
            ("FID",),
            {
                f"lambda1 = {one}, lambda2 = {other}": (fid,)
                for (one, other), fid in zip(
                    [(one, other) for one in ("0.5", "1", "1.5") for other in ("0.1", "0.6", "1.1")],
                    ("41.7", "41.3", "42.0", "41.1", "40.6", "41.1", "41.5", "41.0", "41.3"),
                    strict=True,
                )
            },
        ),
        PaperTable(
            "Figure 7, tau0",
            "The base threshold (tau0 of eq. 12)",
            "euler",
            50,
            tuple(_moeca(f"tau0 = {tau0:g}", tau0=tau0) for tau0 in (0.65, 0.7, 0.8, 0.9, 1.0)),
        ),
        PaperTable(
            "Figure 7, beta",
            "The decay of the activation statistic (beta of eq. 10)",
            "euler",
            50,
            tuple(_moeca(f"beta = {beta:g}", beta=beta) for beta in (0.45, 0.55, 0.65, 0.75, 0.85)),
        ),
    )


def panel_of(table: PaperTable, images: int, images_of_long: int) -> Panel:
    return Panel(table.sampler, table.steps, 1.0, images if table.steps <= 50 else images_of_long)


def results_of(testbed: Testbed) -> Path:
    return RESULTS / f"paper-{testbed.name}.csv"


# --- Markdown -------------------------------------------------------------------------------------------------


def shown(table: PaperTable, rows: Sequence[Row]) -> Iterator[str]:
    """Lines of Markdown: a table with the values here, then the paper's; nothing where a case has no row."""
    panel = panel_of(table, 2, 2).name
    by_case = {row["case"]: row for row in rows if row["panel"] == panel}
    if any(case.name not in by_case for case in table.cases):
        return
    ours = ("FLOPs", "PSNR", "worst", "SSIM", "reused")
    theirs = [f"paper: {column}" for column in table.columns]
    images = by_case[table.cases[0].name]["images"]
    yield f"**{table.number}.** {table.title}. Here: {table.sampler}, {table.steps} steps, {images} pictures."
    yield ""
    yield "| | " + " | ".join((*ours, *theirs)) + " |"
    yield "|---" * (1 + len(ours) + len(theirs)) + "|"
    for case in table.cases:
        values = [*_values(by_case[case.name]), *table.theirs.get(case.name, ("",) * len(theirs))]
        yield f"| {case.name} | " + " | ".join(values) + " |"
    yield ""


def _values(row: Row) -> list[str]:
    """FLOPs speed-up, PSNR with its standard error, worst image, SSIM, share of matched branches that are reused."""
    reused = f"{100 * float(row['reuse_ratio']):.0f}%" if row["reuse_ratio"] else ""
    error = f" ± {float(row['psnr_error']):.1f}" if row["psnr_error"] else ""
    return [
        f"{float(row['flops_speedup']):.2f}x",
        f"{float(row['psnr']):.1f}{error}",
        f"{float(row['psnr_worst']):.1f}",
        f"{float(row['ssim']):.4f}",
        reused,
    ]


# --- command line ---------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = [table.number for table in tables()]
    add_study_arguments(parser, results_of)
    parser.add_argument("--table", action="append", help=f"one of {names}, or the start of its name (all)")
    parser.add_argument("--images", type=whole_number(2), default=20, help="pictures by a case of 50 steps (20)")
    parser.add_argument("--images-of-long", type=whole_number(2), default=10, help="and by one of 250 steps (10)")
    parser.add_argument("--show", action="store_true", help="measure nothing, and print the tables in Markdown")
    args = parser.parse_args(argv)
    settle(args, results_of)
    wanted = tuple(name if not name.isdigit() else f"Table {name}" for name in args.table or names)
    args.tables = [table for table in tables() if table.number.startswith(wanted)]
    if not args.tables:
        parser.error(f"no table is called {args.table}: {names}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.show:
        if not args.out.exists():
            raise SystemExit(f"{args.out} does not exist: run `python -m bench.paper` first")
        with args.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
        print("\n".join(line for table in args.tables for line in shown(table, rows)))
        return 0
    torch.set_num_threads(args.threads)
    try:
        args.testbed.load_model(args.checkpoint)
    except CheckpointError as error:
        print(f"paper.py: {error}", file=sys.stderr)
        return 1
    held = rows_of(args)
    studies: dict[Panel, Study] = {}
    for table in args.tables:
        panel = panel_of(table, args.images, args.images_of_long)
        study = Study(args.testbed, args.checkpoint, panel.steps, panel.guidance, args.device)
        measure(panel, table.cases, studies.setdefault(panel, study), held)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
