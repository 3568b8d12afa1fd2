"""How long capture and the passes take, before anything is lowered, and how that grows with blocks and experts.

python -m bench.capture_time
python -m bench.capture_time --question blocks --repeats 1 --out other.csv

The models have the layout of a published size but are narrow, since only structure counts here. Columns, in seconds:

cpu, wall   processor time of this process, the least of the repeats, and wall-clock time of that run
capture     Dynamo's share; `passes` is export, matching, validation and planning
rewrite     tracing the graphs of a full step and a cache step (question `layouts` only); at run time this happens
            when a kind of step is first needed
yardstick   processor time of a fixed Python loop, right before each case. Processor time grows on a machine with
            other load, so rows with different yardsticks cannot be compared.

Inductor never runs. Rows are appended to a CSV file, and the latest row of each case is plotted.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console

import moeca_compile
from examples import families
from examples.families.dit_moe import DiTMoESizes
from examples.families.dsmoe import DSMoESizes
from examples.machine import environment
from examples.testbed.arguments import whole_number
from moeca_compile.backend import backend_with, compile_graph
from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.lower.program import trace_step
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.passes.rewrite.step_function import StepFunction
from moeca_compile.runtime.engine import Stages

RESULTS = Path(__file__).resolve().parent / "results" / "capture_time.csv"
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "capture-time.png"
BLOCKS, EXPERTS = (4, 8, 12, 20, 28), (8, 16, 32, 48, 64)

DSMOE = DSMoESizes(width=96, depth=12, heads=6, side=8, classes=10, experts=48, expert_width=32, top_k=5, scale=2.5)
DIT_MOE = DiTMoESizes(width=96, depth=28, heads=6, side=8, classes=10, experts=16, mlp_ratio=1.0)


@dataclass(frozen=True)
class Case:
    """A model to compile; `target` is the most processor time, in seconds, that capture and passes may take."""

    question: str
    family: str
    sizes: DSMoESizes | DiTMoESizes
    target: float | None = None


@dataclass(frozen=True)
class Seconds:
    capture_cpu: float
    passes_cpu: float
    cpu: float
    wall: float
    rewrite_cpu: float


def questions() -> dict[str, tuple[Case, ...]]:
    return {
        "layouts": (
            Case("layouts", "DSMoE", DSMOE, target=6.0),
            Case("layouts", "DiT-MoE", DIT_MOE, target=12.0),
        ),
        "blocks": tuple(Case("blocks", "DiT-MoE", replace(DIT_MOE, depth=n)) for n in BLOCKS),
        "experts": tuple(Case("experts", "DSMoE", replace(DSMOE, experts=n)) for n in EXPERTS),
    }


class _Clock:
    """Seconds since it was created."""

    def __init__(self) -> None:
        self.start = time.process_time(), time.perf_counter()

    @property
    def cpu(self) -> float:
        return time.process_time() - self.start[0]

    @property
    def wall(self) -> float:
        return time.perf_counter() - self.start[1]


class Stopwatch:
    """Stages that measure when a graph is compiled. With `rewrites`, steps are traced too; they run eagerly."""

    def __init__(self, rewrites: bool) -> None:
        self.clock, self.rewrites = _Clock(), rewrites
        self.made_at = self.capture = self.rewrite = 0.0
        self.wall = 0.0

    @property
    def stages(self) -> Stages:
        return Stages(self._compile_graph, self._compile_step)

    def _compile_graph(self, *args: Any) -> CompiledGraph:
        self.capture = self.clock.cpu
        made = compile_graph(*args)
        self.made_at, self.wall = self.clock.cpu, self.clock.wall
        return made

    def _compile_step(self, compiled: CompiledGraph, kind: StepKind, *arguments: Any) -> StepFunction:
        function = compiled.function(kind)
        if self.rewrites:
            start = time.process_time()
            trace_step(function, *arguments[:3])
            self.rewrite += time.process_time() - start
        return function

    def seconds(self) -> Seconds:
        passes = self.made_at - self.capture
        return Seconds(self.capture, passes, self.made_at, self.wall, self.rewrite)


def measure(case: Case, repeats: int) -> Seconds:
    """The repeat with the least processor time. Call `_once` before: the first compilation of a process is slower."""
    return min((_once(case) for _ in range(repeats)), key=lambda seconds: seconds.cpu)


def _once(case: Case) -> Seconds:
    torch._dynamo.reset()
    model = families.assemble(families.FAMILIES[case.family], case.sizes)
    x, t, y = families.inputs_for(model)
    watch = Stopwatch(rewrites=case.target is not None)
    options = {"recipe": "moeca", "lowering": "eager", "disk_cache": False}
    compiled = torch.compile(model, backend=backend_with(watch.stages), options=options)
    with torch.no_grad():
        for at in (t, t - 100) if case.target else (t,):
            compiled(x, at, y)
    found = moeca_compile.report(compiled)
    missed = [region for region in found.regions if region.status != "cached"]
    if found.graphs != 1 or found.graph_breaks or missed:
        raise RuntimeError(f"{case.family} was not captured whole:\n{found}")
    return watch.seconds()


def _yardstick() -> float:
    """Processor time of a fixed piece of work."""
    clock, total = _Clock(), 0
    for number in range(3_000_000):
        total += number
    return clock.cpu


def rows_of(cases: Sequence[Case], repeats: int, where: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A CSV row for each case; `target` is empty where it has none."""
    for case in cases:
        yardstick = round(_yardstick(), 3)
        seconds = {name: round(value, 3) for name, value in asdict(measure(case, repeats)).items()}
        yield {
            "question": case.question,
            "layout": case.family,
            "blocks": case.sizes.depth,
            "experts": case.sizes.experts,
            "width": case.sizes.width,
            **seconds,
            "yardstick": yardstick,
            "target": case.target or "",
            "repeats": repeats,
            **where,
        }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot seconds over blocks and over experts, from the latest row of each case."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    labels = {
        "blocks": "blocks (DiT-MoE, 16 experts in each)",
        "experts": "experts (DSMoE, 12 blocks, 6 with experts)",
    }
    for axis, (question, label) in zip(axes, labels.items(), strict=True):
        latest = {int(row[question]): row for row in rows if row["question"] == question}
        at = sorted(latest)
        for column, name in {"cpu": "capture and passes", "capture_cpu": "capture alone"}.items():
            axis.plot(at, [float(latest[n][column]) for n in at], "o-", label=name)
        axis.set(xlabel=label, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds of processor time")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--question", action="append", choices=questions(), help="may be given several times (all)")
    parser.add_argument("--repeats", type=whole_number(1), default=2, help="runs of a case (2)")
    parser.add_argument("--threads", type=whole_number(1), default=1, help="threads of torch (1)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="CSV", help=f"({RESULTS})")
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="PNG", help=f"({PICTURE})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse_arguments(argv), Console(width=120)
    torch.set_num_threads(args.threads)
    where = environment(torch.device("cpu"), torch.float32)
    cases = [
        case for name, found in questions().items() if not args.question or name in args.question for case in found
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _once(Case("warm-up", "DSMoE", replace(DSMOE, depth=2, experts=8)))
        for row in rows_of(cases, args.repeats, where):
            _append(args.out, row)
            target = f", target {row['target']} s" if row["target"] else ""
            console.print(
                f"{row['question']}: {row['layout']}, {row['blocks']} blocks, {row['experts']} experts: "
                f"cpu {row['cpu']:.1f} s (capture {row['capture_cpu']:.1f}, passes {row['passes_cpu']:.1f}), "
                f"wall {row['wall']:.1f} s, rewrite cpu {row['rewrite_cpu']:.1f} s, "
                f"yardstick {row['yardstick']}{target}"
            )
    with args.out.open() as file:
        draw(list(csv.DictReader(file)), args.picture)
    console.print(f"wrote {args.out} and {args.picture}")
    return 0


def _append(path: Path, row: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
