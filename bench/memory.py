"""How much memory the first call and later steps take beside weights and caches, against plain torch.compile.

python -m bench.memory
python -m bench.memory --model DSMoE-L-E16 --recipe moeca-forecast --device cuda --dtype bfloat16
python -m bench.memory --no-validate                # without the checks of a step's first use

"Beyond" is the most bytes that tensors take at a time during a call, less those of the weights and inputs, and less
those of the planned caches of one stream. On a GPU PyTorch's allocator counts them, on the CPU bench/live_bytes.py.
Rows are appended to a CSV file.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import moeca_compile
from bench.gpu_sections.common import TINY, Bench, Budget, Settings, build
from bench.live_bytes import LiveBytes
from bench.speed import append
from examples import families
from examples.machine import environment
from examples.testbed.arguments import whole_number

RESULTS = Path(__file__).resolve().parent / "results" / "memory.csv"
MODELS = ("DSMoE-S-E16", "DSMoE-S-E48", "DiT-MoE-S")
RECIPES: dict[str, Mapping[str, Any]] = {
    "none": {},
    "moeca-forecast": {},
    "moeca": {"budget": 1 / 16},
    "fora": {},
    "stack": {},
}
PLAIN = "torch.compile"
TARGET = 2.0
"""At most this many times what plain torch.compile takes beyond the weights at its first call."""

Inputs = tuple[Tensor, Tensor, Tensor]


def compiled(model: nn.Module, way: str, options: Mapping[str, Any]) -> Any:
    """The model under plain torch.compile or under a recipe, with full steps every second step."""
    torch._dynamo.reset()
    if way == PLAIN:
        return torch.compile(model)
    schedule = {} if way == "none" else {"full_every": 2, **RECIPES[way]}
    options = {"disk_cache": False, **options}  # validation takes part in the peak
    return torch.compile(model, backend="moeca", options={"recipe": way, **schedule, **options})


def measured(call: Any, way: str, inputs: Inputs) -> Iterator[dict[str, Any]]:
    """For the first full and cache step, which compile, and for later ones: the peak, and what of it is caches."""
    x, t, y = inputs
    live = LiveBytes(x.device)
    for number in range(1 if way == PLAIN else 4):
        gc.collect()
        live.restart_peak()
        out = call(x * (1 - number / 100), t - number, y)  # as a sampler moves its picture
        peak = live.peak
        planned = 0 if way == PLAIN else moeca_compile.report(call).planned_cache_bytes
        del out
        yield {
            "way": way,
            "call": "first" if number == 0 else "first cache" if number == 1 else "full" if number == 2 else "cache",
            "peak_mib": mib(peak),
            "planned_mib": mib(planned),
            "beyond_mib": mib(peak - planned),
        }


def mib(number: int) -> float:
    return round(number / 2**20, 3)


def rows_of(
    model: nn.Module, inputs: Inputs, recipes: Sequence[str], options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows of plain torch.compile, then of each recipe; `ratio` is over the first."""
    plain = 0.0
    for way in (PLAIN, *recipes):
        call = compiled(model, way, options)
        with torch.no_grad():
            for row in measured(call, way, inputs):
                plain = plain or row["beyond_mib"]
                yield {**row, "ratio": round(row["beyond_mib"] / plain, 2)}
        del call


def weights_mib(model: nn.Module) -> float:
    return mib(sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())))


def prepared(name: str, args: argparse.Namespace) -> tuple[nn.Module, Inputs]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = build(name, Bench(Settings(device, dtype), Budget(0), lambda row: None))
    x, t, y = families.inputs_for(model, batch=args.batch)
    return model, (x.to(dtype), t, y)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = ", ".join(MODELS)
    parser.add_argument(
        "--model", action="append", choices=[*families.PUBLISHED, TINY], help=f"several times ({names})"
    )
    parser.add_argument("--recipe", action="append", choices=list(RECIPES), help="several times (all)")
    parser.add_argument("--batch", type=whole_number(1), default=4, help="samples (4)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(float32)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(cpu)")
    parser.add_argument("--no-validate", action="store_true", help="leave the checks of new steps out")
    parser.add_argument("--threads", type=whole_number(1), default=2, help="threads of torch (2)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="CSV", help=f"({RESULTS})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse_arguments(argv), Console(highlight=False)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # torch warns at every compilation
    where = environment(torch.device(args.device), getattr(torch, args.dtype))
    options = {"validate": False} if args.no_validate else {}
    for name in args.model or MODELS:
        model, inputs = prepared(name, args)
        console.print(f"{name}, batch {args.batch}, {args.dtype}, weights {weights_mib(model)} MiB")
        for row in rows_of(model, inputs, args.recipe or list(RECIPES), options):
            mark = "" if row["ratio"] <= TARGET else f" (more than {TARGET:g}x)"
            console.print(
                "  {way} {call}: {beyond_mib} MiB beyond {planned_mib} planned, {ratio}x".format(**row) + mark
            )
            kept = {"weights_mib": weights_mib(model), "validated": not args.no_validate}
            append([{"model": name, "batch": args.batch, **row, **kept, **where}], args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
