"""The effect of each recipe and option on a testbed: quality and FLOPs, no timings.

python -m bench.policies
python -m bench.policies --question recipes --question intervals --out figures.csv
python -m bench.policies --testbed mnist --question overview

Every case generates pictures from the same seeds as the uncached model, and is compared with its pictures. Steps are
traced as always but run eagerly, without Inductor, so that a case takes seconds. Results equal those of compiled
steps up to rounding; times mean nothing (examples/digits/sample.py measures those). Rows go to a CSV file, and a
table for each question to the terminal.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.study import (
    RESULTS,
    Case,
    Costs,
    Scores,
    Setting,
    Study,
    add_study_arguments,
    described,
    fingerprint,
    rounded,
    run_case,
    settle,
)
from examples.digits.testbed import DIGITS
from examples.machine import environment
from examples.testbed.arguments import guidance_scale, whole_number
from examples.testbed.checkpoint import CheckpointError
from examples.testbed.testbed import Testbed
from moeca_compile.config import RECIPES

FORECASTS = ("attention", "experts", "shared")


@dataclass(frozen=True, eq=False)
class Question:
    """Cases that answer one question, and the fewest pictures that an answer needs."""

    name: str
    cases: tuple[Case, ...]
    setting: Setting = field(default_factory=Setting)


# --- the questions ------------------------------------------------------------------------------------------


def questions() -> tuple[Question, ...]:
    return (
        Question("overview", (*_overview((3, 5)), *_fewer_steps(("euler", "multistep"), (17, 10))), Setting(sets=2)),
        Question("recipes", (*_recipes((3, 4, 6)), *_fewer_steps(("euler", "multistep")))),
        Question("moeca", _variants("moeca", _MOECA_OPTIONS), Setting(sets=2)),
        Question("moeca-forecast", _variants("moeca-forecast", _FORECAST_OPTIONS), Setting(sets=2)),
        Question("intervals", tuple(_intervals()), Setting(sets=2)),
        Question(
            "schedules",
            (*_schedules((3, 4, 5, 7), _CORRECTED), *_fewer_steps(("euler", "multistep"), (17, 13, 10, 8))),
        ),
        Question("exponents", tuple(_exponents((3, 5))), Setting(sets=2)),
        Question("forecasters", tuple(_forecasters((4, 7)))),
        Question("rivals", tuple(Case(described(options), options) for options in _RIVALS)),
        Question("decisions", (*_evenly_spaced((3, 4)), *_variants_of(_DECIDING))),
        Question("errors", tuple(_error_controlled()), Setting(alone=True)),
        Question("schedules-multistep", tuple(_schedules((4, 7), _CORRECTED[-1:])), Setting("multistep")),
        Question("schedules-ddpm", (*_schedules((4, 6), _SCHEDULED), *_half_slopes((4, 6))), Setting("ddpm", 100, 2)),
        Question("ddpm", (*_recipes((4, 6)), *_fewer_steps(("ddpm",), (25, 13, 9))), Setting("ddpm", 100, 2)),
    )


def _overview(intervals: Sequence[int]) -> Iterator[Case]:
    """The main recipes, of the paper's one also without any branch recomputed, which costs as much as the others."""
    for every in intervals:
        for recipe in ("auto", "stack-forecast", "stack", "fora", "moeca-forecast", "moeca"):
            told = {"sampler": "deterministic"} if recipe == "auto" else {}
            yield Case(f"{recipe}, N = {every}", {"recipe": recipe, "full_every": every, **told})
        yield Case(f"moeca, N = {every}, budget=0", {"recipe": "moeca", "full_every": every, "budget": 0.0})
        for chosen in ({"schedule": "power"}, {"corrector": True}):  # what `auto` adds to `stack-forecast`
            name = f"stack-forecast, N = {every}, {described(chosen)}"
            yield Case(name, {"recipe": "stack-forecast", "full_every": every, **chosen})


def _recipes(intervals: Sequence[int]) -> Iterator[Case]:
    yield Case("none", {"recipe": "none"})
    for every in intervals:
        for recipe, policy in RECIPES.items():
            if not policy.caches or policy.decides is not None or recipe == "auto":  # that is one of `_schedules`
                continue
            yield Case(f"{recipe}, N = {every}", {"recipe": recipe, "full_every": every})


def _evenly_spaced(intervals: Sequence[int]) -> Iterator[Case]:
    for every in intervals:
        for recipe in ("stack", "stack-forecast"):
            yield Case(f"{recipe}, N = {every}", {"recipe": recipe, "full_every": every})


def _variants_of(options: Sequence[Mapping[str, Any]]) -> Iterator[Case]:
    for chosen in options:
        rest = {name: value for name, value in chosen.items() if name != "recipe"}
        yield Case(", ".join(filter(None, (chosen["recipe"], described(rest)))), chosen)


_BOTH: dict[str, Any] = {"forecast": ("stack",), "corrector": True}
_DECIDING: tuple[dict[str, Any], ...] = (
    {"recipe": "teacache"},
    {"recipe": "block-cache"},
    {"recipe": "magcache"},
    # About 3 and 4 times fewer FLOPs.
    {"recipe": "teacache", "reuse_threshold": 0.11},
    {"recipe": "teacache", "reuse_threshold": 0.16},
    {"recipe": "block-cache", "reuse_threshold": 0.17},
    {"recipe": "block-cache", "reuse_threshold": 0.28},
    {"recipe": "magcache", "retention": 0.06},
    {"recipe": "magcache", "reuse_threshold": 0.18, "max_reused": 5, "retention": 0.06},
    {"recipe": "teacache", "reuse_threshold": 0.11, **_BOTH},
    {"recipe": "teacache", "reuse_threshold": 0.16, **_BOTH},
    {"recipe": "block-cache", "reuse_threshold": 0.17, **_BOTH},
    {"recipe": "block-cache", "reuse_threshold": 0.28, **_BOTH},
)

_SCHEDULED: tuple[dict[str, Any], ...] = ({"schedule": "power"},)
_CORRECTED: tuple[dict[str, Any], ...] = (
    *_SCHEDULED,
    {"corrector": True},
    {"schedule": "power", "corrector": True},
)


def _schedules(intervals: Sequence[int], options: Sequence[Mapping[str, Any]]) -> Iterator[Case]:
    """Even full steps, and each of these options, with and without a forecast."""
    for every in intervals:
        for recipe in ("stack", "stack-forecast"):
            for chosen in ({}, *options):
                name = ", ".join(filter(None, (f"{recipe}, N = {every}", described(chosen))))
                yield Case(name, {"recipe": recipe, "full_every": every, **chosen})


_EXPONENTS = (1.0, 1.15, 1.3, 1.45)
"""Of the power schedule; 1 is even full steps."""


def _exponents(intervals: Sequence[int]) -> Iterator[Case]:
    for every in intervals:
        for exponent in _EXPONENTS:
            options = {"recipe": "stack-forecast", "full_every": every, "schedule": "power", "corrector": True}
            yield Case(f"N = {every}, exponent {exponent}", {**options, "schedule_exponent": exponent})


_BOUNDS: dict[str, dict[int, tuple[float, ...]]] = {
    "power": {4: (0.105,), 5: (0.15,)},
    "uniform": {4: (0.09,), 5: (0.13,)},
}
"""Bounds of the error by schedule and `full_every`, at which about as many steps are full as without."""


def _error_controlled() -> Iterator[Case]:
    """The corrected forecast by schedules, and with the gaps between full steps scaled by the error."""
    for schedule, bounds in _BOUNDS.items():
        for every, chosen in bounds.items():
            options = {"recipe": "stack-forecast", "full_every": every, "schedule": schedule, "corrector": True}
            yield Case(f"{schedule}, N = {every}", options)
            for bound in chosen:
                yield Case(f"{schedule}, N = {every}, max_error={bound}", {**options, "max_error": bound})


_FORECASTERS = (
    ("taylor", (2, 3)),
    ("taylorseer", (2, 4)),
    ("hermite", (2, 4)),
    ("adams-bashforth", (3,)),
    ("chebyshev", (2, 4)),
)
"""Forecasters with their orders, but for 0 and 1: these are `stack` and `stack-forecast` of the schedules."""


def _forecasters(intervals: Sequence[int]) -> Iterator[Case]:
    """Each forecaster of the stack's change, with even full steps, and with a power schedule and the corrector."""
    for every in intervals:
        for chosen in ({}, _CORRECTED[-1]):
            for name, order in ((name, order) for name, orders in _FORECASTERS for order in orders):
                label = f"{name} {order}, N = {every}{', power, corrector' * bool(chosen)}"
                options = {"forecaster": name, "forecast_order": order, **chosen}
                yield Case(label, {"recipe": "stack-forecast", "full_every": every, **options})


_RIVALS: tuple[dict[str, Any], ...] = (
    {"recipe": "taylorseer", "forecast_order": 1},
    {"recipe": "taylorseer", "forecast_order": 2},
    {"recipe": "taylorseer", "forecast_order": 2, "schedule": "power", "corrector": True},
    {"recipe": "deepcache", "last_blocks": 0},
    {"recipe": "deepcache", "first_blocks": 2, "last_blocks": 2},
    {"recipe": "deepcache", "forecast": ("middle",)},
    {"recipe": "delta", "boundary": 0.0},
    {"recipe": "delta", "boundary": 1.0},
    {"recipe": "delta", "forecast": ("blocks",)},
    {"recipe": "toca", "token_score": "value_norm"},
    {"recipe": "toca", "token_score": "random"},
    {"recipe": "toca", "fresh_ratio": 0.0},
    {"recipe": "toca", "fresh_ratio": 0.28},
    {"recipe": "toca", "schedule": "uniform"},
    {"recipe": "toca", "schedule": "power"},
    {"recipe": "duca", "token_score": "attention"},
    {"recipe": "duca", "token_score": "random"},
    {"recipe": "duca", "schedule": "uniform"},
    {"recipe": "duca", "schedule": "power"},
)
"""Options of the papers' methods, whose defaults are among the recipes."""


def _half_slopes(intervals: Sequence[int]) -> Iterator[Case]:
    """For a sampler whose noise is in the slope of a forecast, too."""
    for every in intervals:
        for schedule in ("uniform", "power"):
            options = {"recipe": "stack-forecast", "full_every": every, "schedule": schedule, "forecast_slope": 0.5}
            yield Case(f"stack-forecast, N = {every}, {schedule}, half slope", options)


def _fewer_steps(samplers: Sequence[str], counts: Sequence[int] = (25, 17, 13, 9)) -> Iterator[Case]:
    for sampler in samplers:
        for steps in counts:
            yield Case(f"uncached, {steps} {sampler} steps", None, steps, sampler)


def _variants(recipe: str, options: Sequence[Mapping[str, Any]]) -> tuple[Case, ...]:
    """The recipe with its defaults, and with each of these sets of options."""
    changed = (Case(described(option), {"recipe": recipe, **option}) for option in options)
    return (Case(recipe, {"recipe": recipe}), *changed)


_MOECA_OPTIONS: tuple[dict[str, Any], ...] = (
    {"keys_values": "all"},
    {"keys_values": "none"},
    {"mask_source": "previous"},
    {"mask_source": "previous", "keys_values": "all"},
    {"shared": "any"},
    {"shared": "always"},
    {"keys_values": "all", "shared": "any"},
    {"entropy": "minmax"},
    {"statistic": "batch"},
    {"score_weights": "raw"},
    {"score": "drift"},
    {"score": "drift", "tau0": 0.05},
    {"score": "staleness"},
    {"overwrite": False},
    {"tau0": 0.4},
    {"tau0": 1.2},
    {"alpha": 0.0},
    {"budget": 0.0},
    {"budget": 1 / 32},
    {"budget": 1 / 16},
    {"budget": 1 / 8},
    {"budget": 1 / 4},
    {"budget": 1 / 16, "score": "drift"},
    {"budget": 1 / 16, "score": "staleness"},
    {"budget": 1 / 16, "keys_values": "all"},
    {"capacities": (1 / 4, 1.0)},
    {"capacities": (1.0,)},
    {"forecast": ("attention",)},
    {"forecast": ("experts",)},
    {"forecast": ("shared",)},
    {"forecast": ("attention", "experts")},
    {"forecast": FORECASTS},
)

_FORECAST_OPTIONS: tuple[dict[str, Any], ...] = (
    {"forecast": ("attention",)},
    {"forecast": ("experts",)},
    {"forecast": ("experts", "shared")},
    {"forecast": ("attention", "experts")},
    {"budget": 1 / 32},
    {"budget": 1 / 16},
    {"budget": 1 / 8},
    {"budget": 1 / 4},
    {"budget": None},
    {"budget": 1 / 16, "keys_values": "all"},
    {"budget": 1 / 16, "keys_values": "none"},
    {"budget": 1 / 16, "score": "drift"},
    {"budget": 1 / 16, "score": "staleness"},
    {"budget": 1 / 16, "mask_source": "previous"},
    {"budget": 1 / 16, "shared": "any"},
    {"budget": 1 / 16, "overwrite": False},
    {"shared": "always"},
    {"cache_dtype": "bfloat16"},
)


def _intervals() -> Iterator[Case]:
    for recipe in ("fora", "fora-forecast", "moeca", "moeca-forecast"):
        for attention, experts in ((4, 4), (4, 8), (8, 4), (6, 6)):
            name = f"{recipe}, attention {attention}, experts {experts}"
            yield Case(name, {"recipe": recipe, "attention_every": attention, "experts_every": experts})


# --- rows, tables, command line -----------------------------------------------------------------------------


def row_of(
    study: Study, question: Question, case: Case, scores: Scores, costs: Costs, where: Mapping[str, Any]
) -> dict[str, Any]:
    """One line of the CSV file."""
    options = "" if case.options is None else described(case.options)
    return {
        "question": question.name,
        "case": case.name,
        "options": options,
        "sampler": case.sampler or question.setting.sampler,
        "steps": case.steps or study.steps,
        "guidance": study.guidance,
        "images": question.setting.images,
        "seed_sets": question.setting.sets,
        **{name: rounded(value) for name, value in (asdict(scores) | asdict(costs)).items()},
        **where,
    }


def table_of(question: Question, rows: Sequence[Mapping[str, Any]]) -> Table:
    title = f"{question.name}: {question.setting.sampler}, {question.setting.sets} x {question.setting.images} images"
    table = Table(title=title)
    table.add_column("case")
    columns = [item.name for item in (*fields(Costs), *fields(Scores))]
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        shown = (row[column] for column in columns)
        table.add_row(str(row["case"]), *(f"{v:.2f}" if isinstance(v, float) else str(v) for v in shown))
    return table


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    names = [question.name for question in questions()]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_study_arguments(parser, _results)
    parser.add_argument("--question", action="append", choices=names, help="may be given several times (all)")
    parser.add_argument("--images", type=whole_number(2), help="images per seed set (10, and 100 for ddpm)")
    parser.add_argument("--sets", type=whole_number(1), help="seed sets (2, and 3 for recipes)")
    parser.add_argument("--steps", type=whole_number(2, 1000), default=50, help="sampling steps (50)")
    parser.add_argument("--guidance", type=guidance_scale, help="classifier-free guidance (the testbed's)")
    args = parser.parse_args(argv)
    settle(args, _results)
    args.guidance = args.testbed.guidance if args.guidance is None else args.guidance
    return args


def _results(testbed: Testbed) -> Path:
    return RESULTS / ("policies.csv" if testbed is DIGITS else f"policies-{testbed.name}.csv")


def chosen_questions(args: argparse.Namespace) -> list[Question]:
    found = [q for q in questions() if not args.question or q.name in args.question]
    return [replace(q, setting=_resized(q.setting, args)) for q in found]


def _resized(setting: Setting, args: argparse.Namespace) -> Setting:
    return replace(setting, images=args.images or setting.images, sets=args.sets or setting.sets)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    study = Study(args.testbed, args.checkpoint, args.steps, args.guidance, args.device)
    console = Console(width=180)
    try:
        study.model()
    except CheckpointError as error:
        print(f"policies.py: {error}", file=sys.stderr)
        return 1
    where = environment(args.device, torch.float32) | {"checkpoint": fingerprint(args.checkpoint)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        tables = _answer(study, chosen_questions(args), where, console, file)
    for table in tables:
        console.print(table)
    console.print(f"wrote {args.out}")
    return 0


def _answer(
    study: Study, chosen: Sequence[Question], where: Mapping[str, Any], console: Console, file: TextIO
) -> list[Table]:
    """Run the cases and write a line to `file` after each; returns a table for each question."""
    columns = (TextColumn("{task.description:<60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: dict[Question, list[dict[str, Any]]] = {question: [] for question in chosen}
    with Progress(*columns, console=console) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns at every compilation
        pairs = [(question, case) for question in chosen for case in question.cases]
        task = progress.add_task("", total=len(pairs))
        for question, case in pairs:
            progress.update(task, description=f"{question.name}: {case.name}")
            scores, costs = run_case(study, question.setting, case)
            row = row_of(study, question, case, scores, costs, where)
            _write(file, row, header=not any(rows.values()))
            rows[question].append(row)
            progress.advance(task)
    return [table_of(question, answers) for question, answers in rows.items()]


def _write(file: TextIO, row: Mapping[str, Any], header: bool) -> None:
    writer = csv.DictWriter(file, list(row), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerow(row)
    file.flush()


if __name__ == "__main__":
    sys.exit(main())
