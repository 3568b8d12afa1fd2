"""How long steps and generations of the published models take: eager, plain torch.compile, and moeca.

python -m bench.speed                                        # all models; see --help for fewer
python -m bench.speed --model DSMoE-S-E16 --dtype bfloat16 --fraction 0 --fraction 0.0625 --repeats 5

A way is one way of running the model: eager, torch.compile, or moeca with a fraction. The fraction is a rank budget:
the share of a layer's branches that every cache step recomputes, so that the work is the same on every machine.

Each way has two copies of the model, since the position of weights in memory changes times by a tenth and more. Plain
torch.compile and the first moeca way are compiled cold, each with an empty Inductor cache. Further fractions use the
cache that the first one filled, as a further capacity would. The second copy is compiled with a full cache
(`warm_seconds`). Then all copies run in turns of four steps (with moeca, one full and three cache steps), so that
drift of the machine affects all ways alike.

over_compile  median over turns of the step time of plain torch.compile over that of this way
over_full     time of a step over that of a full step of the same way; `share` is that ratio in FLOPs
peak_mib      the most that one step allocated beside inputs, weights and caches

A row of kind `generation` is the sum of a turn. With --steps, a row of kind `loop` is a whole generation.
Rows are appended to a CSV file, and the parts of a step's time to another; `python -m bench.plot` plots both.
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
from torch.profiler import ProfilerActivity, profile

import moeca_compile
from examples import families
from examples.machine import environment, private_copy
from examples.testbed.arguments import whole_number

RESULTS = Path(__file__).resolve().parent / "results" / "speed.csv"
SPLIT = RESULTS.with_name("step_split.csv")
MODELS = ("DSMoE-S-E16", "DSMoE-S-E48", "DiT-MoE-S", "Diff-MoE-S", "DiffMoE-S-E16")
FRACTIONS = (0.0, 1 / 16, 1 / 8, 1 / 4)
PERIOD = 4
STAGES = ("capture", "match", "validate", "plan", "rewrite", "lower")
EAGER, COMPILED, UNCACHED = "eager", "torch.compile", "none"
PARTS = {
    "linear layers": ("moeca::linear", "mkldnn::_linear_pointwise", "aten::addmm", "aten::mm", "aten::linear"),
    "experts": (
        "moeca::refresh_fixed_k",
        "moeca::refresh_variable_k",
        "moeca::fixed_k_outputs",
        "moeca::variable_k_outputs",
    ),
    "attention": ("moeca::attend_rows", "aten::scaled_dot_product_attention"),
    "top-k and sort": ("aten::topk", "aten::sort"),
}
"""Ops by kind of work. An op's time includes that of the ops it calls. Fused kernels are found by their names."""


@dataclass
class Way:
    """One way of running the model: the callable, and the milliseconds of its calls by turn and step.

    `twin` is a second copy of the model that runs in the same way, every other turn.
    """

    name: str
    call: Any
    options: Mapping[str, Any] | None = None
    twin: Any = None
    cold_seconds: float = 0.0
    warm_seconds: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)
    peak_mib: float = 0.0
    loop: list[float] = field(default_factory=list)
    turns: list[list[float]] = field(default_factory=list)

    @property
    def caching(self) -> bool:
        return self.name not in (EAGER, COMPILED, UNCACHED)

    def milliseconds(self, kind: str) -> list[float]:
        """For each turn, the median of its "full", "cache" or all ("step") steps, or their sum ("generation")."""
        if kind == "generation":
            return [sum(turn) for turn in self.turns]
        part = {"step": slice(None), "cache": slice(1, None), "full": slice(0, 1)}[kind]
        return [median(turn[part]) for turn in self.turns]


def compiled(name: str, model: nn.Module, options: Mapping[str, Any] | None) -> Way:
    """A way with its own copy of the model; `options` None means plain torch.compile."""
    copy = private_copy(model)
    if options is None:
        return Way(name, torch.compile(copy))
    schedule = {} if options["recipe"] == "none" else {"full_every": PERIOD}
    return Way(name, torch.compile(copy, backend="moeca", options={**options, **schedule}), options)


def ways(model: nn.Module, fractions: Sequence[float]) -> list[list[Way]]:
    """The ways to compare, in groups that share an Inductor cache."""
    ours = [compiled(f"moeca {fraction:g}", model, {"recipe": "moeca", "budget": fraction}) for fraction in fractions]
    return [
        [Way(EAGER, private_copy(model))],
        [compiled(COMPILED, model, None)],
        [*ours, compiled(UNCACHED, model, {"recipe": "none"})],
    ]


def run_turn(call: Any, inputs: tuple[Tensor, Tensor, Tensor], turn: int, steps: int = PERIOD) -> list[float]:
    """Milliseconds of the steps of one period."""
    x, t, y = inputs
    times = []
    for step in range(steps):
        at = t - (turn * PERIOD + step)
        start = time.perf_counter()
        call(x, at, y)
        times.append(1000 * (time.perf_counter() - start))
    return times


def seconds_to_compile(call: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Seconds that the first turn takes longer than the second."""
    first, second = (sum(run_turn(call, inputs, turn)) for turn in (0, 1))
    return (first - second) / 1000


def compile_all(
    model: nn.Module, groups: Sequence[Sequence[Way]], inputs: tuple[Tensor, Tensor, Tensor], console: Console
) -> None:
    """Compile every way, then its twin with the Inductor cache that the first compilation filled."""
    for group in groups:
        with fresh_cache():
            for way in group:
                if way.name == EAGER:
                    way.twin = private_copy(model)
                    continue
                way.cold_seconds = seconds_to_compile(way.call, inputs)
                way.twin = compiled(way.name, model, way.options).call
                way.warm_seconds = seconds_to_compile(way.twin, inputs)
                if way.options is not None:
                    way.stages = moeca_compile.report(way.call).compile_seconds
                console.print(f"  {way.name}: compiled in {way.cold_seconds:.1f} s, warm {way.warm_seconds:.1f} s")


def measure(
    model: nn.Module, batch: int, fractions: Sequence[float], repeats: int, steps: int, console: Console
) -> list[Way]:
    """Compile every way, then run them in turns."""
    x, t, y = families.inputs_for(model, batch=batch)
    inputs = (x.to(next(model.parameters()).dtype), t, y)
    groups = ways(model, fractions)
    found = [way for group in groups for way in group]
    with torch.no_grad():
        compile_all(model, groups, inputs, console)
        for turn in range(2, 2 + repeats):
            for way in found:
                way.turns += [run_turn(call, inputs, turn) for call in (way.call, way.twin)]
        for way in found:
            way.peak_mib = peak_of_step(way, inputs, 2 + repeats)
            if steps:
                way.loop = [sum(run_turn(call, inputs, 100, steps)) for call in (way.call, way.twin)]
    return found


def profiled(way: Way, inputs: tuple[Tensor, Tensor, Tensor], turn: int) -> Any:
    """A profile of the last step of a turn: a cache step, where the way caches."""
    x, t, y = inputs
    run_turn(way.call, inputs, turn, PERIOD - 1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
        way.call(x, t - (turn * PERIOD + PERIOD - 1), y)
    return taken


def peak_of_step(way: Way, inputs: tuple[Tensor, Tensor, Tensor], turn: int) -> float:
    """The most MiB that a step has allocated at a time."""
    live = most = 0
    for event in profiled(way, inputs, turn).profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most / 2**20


def split_of_step(way: Way, inputs: tuple[Tensor, Tensor, Tensor], turn: int) -> dict[str, float]:
    """Milliseconds of a cache step by kind of work; time outside of ops counts as "calls"."""
    roots = [event for event in profiled(way, inputs, turn).events() if event.cpu_parent is None]
    split = dict.fromkeys([*PARTS, "fused kernels", "other ops", "calls"], 0.0)
    for root in roots:
        _add_times(root, split)
    return {part: spent / 1000 for part, spent in split.items()}


def _add_times(event: Any, split: dict[str, float]) -> None:
    part = next((part for part, names in PARTS.items() if event.name in names), None)
    if part is None and "_fused_" in event.name:
        part = "fused kernels"
    if part is not None:
        split[part] += event.cpu_time_total
        return
    split["other ops" if event.name.startswith("aten::") else "calls"] += event.self_cpu_time_total
    for child in event.cpu_children:
        _add_times(child, split)


def rows_of(name: str, batch: int, found: Sequence[Way], where: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows for each way: its kinds of step, the sum of a turn, and the whole generation where one was run."""
    base = next(way for way in found if way.name == COMPILED)
    for way in found:
        for kind in ("full", "cache", "generation") if way.caching else ("step",):
            times = way.milliseconds(kind)
            plain = base.milliseconds("generation" if kind == "generation" else "step")
            yield _row(name, batch, way, kind, times, plain, where)
        if way.loop:
            yield _row(name, batch, way, "loop", way.loop, base.loop, where)


def _row(
    name: str,
    batch: int,
    way: Way,
    kind: str,
    times: Sequence[float],
    plain: Sequence[float],
    where: Mapping[str, Any],
) -> dict[str, Any]:
    cached = way.caching and kind == "cache"
    full = way.milliseconds("full")
    report = moeca_compile.report(way.call) if way.options is not None else None
    return {
        "model": name,
        "batch": batch,
        "way": way.name,
        "kind": kind,
        "milliseconds": round(median(times), 2),
        "over_compile": round(median(b / t for b, t in zip(plain, times, strict=True)), 3),
        "over_full": round(median(t / f for t, f in zip(times, full, strict=True)), 4) if cached else "",
        "share": round(cache_share(way), 4) if way.caching and kind != "full" else "",
        "cold_seconds": round(way.cold_seconds, 1),
        "warm_seconds": round(way.warm_seconds, 1),
        **{f"{stage}_seconds": round(way.stages.get(stage, 0.0), 2) for stage in STAGES},
        "cache_mib": round(report.cache_bytes / 2**20, 2) if report is not None else "",
        "peak_mib": round(way.peak_mib, 2),
        "repeats": len(times),
        **where,
    }


def cache_share(way: Way) -> float:
    """FLOPs of a cache step over those of a full step, from the report."""
    report = moeca_compile.report(way.call)
    assert report.flops is not None
    steps, full = sum(report.steps.values()), report.steps["full"]
    return (report.flops.mean_step / report.flops.full_step * steps - full) / (steps - full)


def append(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Append the rows to the CSV file, with a header if the file is new."""
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
    parser.add_argument("--repeats", type=whole_number(1), default=5, help="turns of four steps with each copy (5)")
    parser.add_argument(
        "--steps", type=whole_number(0), default=0, help="also run a whole generation of this many steps (0: none)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(float32)")
    parser.add_argument("--threads", type=whole_number(1), default=2, help="threads of torch (2)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="CSV", help=f"({RESULTS})")
    parser.add_argument("--split", type=Path, default=SPLIT, metavar="CSV", help=f"({SPLIT})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse_arguments(argv), Console(highlight=False)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    where = environment(torch.device("cpu"), dtype)
    warnings.simplefilter("ignore")  # torch warns at every compilation
    torch._inductor.config.cpp.enable_kernel_profile = True  # only names fused kernels in the profile
    torch.compile(torch.sin)(
        torch.ones(1)
    )  # the first compilation of a process takes 8 s more, while Inductor probes the C++ compiler
    for name in args.model or MODELS:
        model = families.reduced("DSMoE") if name == "tiny" else families.build(name)
        model = model.to(dtype)
        console.print(f"{name}, batch {args.batch}, {args.dtype}")
        found = measure(model, args.batch, args.fraction or FRACTIONS, args.repeats, args.steps, console)
        rows = list(rows_of(name, args.batch, found, where))
        for row in rows:
            console.print("  {way} {kind}: {milliseconds} ms, {over_compile}x, {over_full} of full".format(**row))
        append(rows, args.out)
        append(list(splits_of(name, model, args.batch, found, where)), args.split)
    return 0


def splits_of(
    name: str, model: nn.Module, batch: int, found: Sequence[Way], where: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows with the time of a cache step by kind of work."""
    x, t, y = families.inputs_for(model, batch=batch)
    inputs = (x.to(next(model.parameters()).dtype), t, y)
    with torch.no_grad():
        for way in found:
            if way.caching:
                for part, spent in split_of_step(way, inputs, 200).items():
                    yield {"model": name, "batch": batch, "way": way.name, "part": part} | {
                        "milliseconds": round(spent, 3),
                        **where,
                    }


if __name__ == "__main__":
    sys.exit(main())
