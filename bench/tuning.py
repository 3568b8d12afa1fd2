"""A whole tune on the digits testbed, then schedules compared at equal numbers of full steps on fresh seeds.

python -m bench.tuning
python -m bench.tuning --speedup 3 --plot frontier.png

The tune is what a user would run: compiled, and timed in turns with the uncached model. The comparison needs no
times, so its steps run op by op: a forecast of the stack's change with the corrector, and full steps that are even,
of the power schedule, or calibrated by the tune. Results go to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import moeca_compile
from examples.digits.testbed import DIGITS, load_model
from examples.testbed import metrics
from examples.testbed.arguments import guidance_scale, whole_number
from examples.testbed.checkpoint import CheckpointError
from examples.testbed.sampling import SAMPLERS

RESULTS = Path(__file__).resolve().parent / "results" / "tuning.json"
FRESH = 1000
"""The first seed of the comparison, which no tune has seen."""


class Loop:
    """The sampling loop: pictures [B, 1, 8, 8] in [-1, 1] of classes that go on with the seed."""

    def __init__(self, batch: int, steps: int, guidance: float, sampler: str) -> None:
        self.batch, self.steps, self.guidance, self.sampler = batch, steps, guidance, sampler

    def __call__(self, model: Any, seed: int) -> Tensor:
        labels = (torch.arange(self.batch) + self.batch * seed) % 10
        options: dict[str, Any] = {"steps": self.steps, "guidance": self.guidance, "sampler": self.sampler}
        return DIGITS.generate(model, labels, seed=seed, **options).clamp(-1, 1)


def schedules(tuned: Path) -> dict[str, Mapping[str, Any]]:
    """The options of each schedule by name."""
    return {"uniform": {}, "power": {"schedule": "power"}, "calibrated": {"schedule": str(tuned)}}


def compared(
    checkpoint: Path, loop: Loop, tuned: Path, intervals: Sequence[int], seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """For each interval and schedule, the PSNR of each picture to the uncached one: mean and worst in dB."""
    uncached = [loop(load_model(checkpoint), seed) for seed in seeds]
    for every in intervals:
        for name, chosen in schedules(tuned).items():
            options = {"recipe": "stack-forecast", "full_every": every, "corrector": True, **chosen}
            cached = {"lowering": "eager", "validate": False, "progress": False, **options}
            model = torch.compile(load_model(checkpoint), backend="moeca", options=cached)
            found = []
            for seed, wanted in zip(seeds, uncached, strict=True):
                with moeca_compile.generation(steps=loop.steps):
                    pictures = loop(model, seed)
                found += [metrics.psnr(a[None], b[None]) for a, b in zip(pictures, wanted, strict=True)]
            steps = moeca_compile.report(model).steps
            full = round(steps["full"] * loop.steps / sum(steps.values()))
            torch._dynamo.reset()
            yield {"full_steps": full, "schedule": name, "psnr": round(mean(found), 2), "worst": round(min(found), 2)}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--speedup", type=float, default=4.0, help="the wish (4)")
    parser.add_argument("--batch", type=whole_number(1), default=5, help="images in a generation (5)")
    parser.add_argument("--steps", type=whole_number(4, 1000), default=50, help="sampling steps (50)")
    parser.add_argument("--guidance", type=guidance_scale, default=1.5, help="classifier-free guidance (1.5)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="euler", help="(euler)")
    parser.add_argument("--seeds", type=whole_number(2), default=8, help="seeds of the tune (8)")
    parser.add_argument("--fresh", type=whole_number(1), default=6, help="seeds of the comparison (6)")
    parser.add_argument("--full-every", type=whole_number(1), nargs="+", default=[3, 4, 5, 7], help="(3 4 5 7)")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor", help="of the tune")
    parser.add_argument("--checkpoint", type=Path, default=DIGITS.model_path, help="weights of the model")
    parser.add_argument("--resume", type=Path, metavar="JSON", help="keep rows here, and go on from them")
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="draw the frontier")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="JSON", help=f"({RESULTS})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        model = load_model(args.checkpoint)
    except CheckpointError as error:
        print(f"tuning.py: {error}", file=sys.stderr)
        return 1
    loop, start = Loop(args.batch, args.steps, args.guidance, args.sampler), time.perf_counter()
    options = {"lowering": args.lowering}
    tuned = moeca_compile.tune(
        model, loop, speedup=args.speedup, seeds=args.seeds, options=options, resume=args.resume
    )
    seconds = time.perf_counter() - start
    print(f"{tuned}\ntuned in {seconds:.0f} s", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tuned.save(args.out)
    if args.plot:
        tuned.plot().figure.savefig(args.plot, dpi=150)
    torch._dynamo.reset()
    rows = []
    for row in compared(args.checkpoint, loop, args.out, args.full_every, range(FRESH, FRESH + args.fresh)):
        print(row, flush=True)
        rows.append(row)
    values = json.loads(args.out.read_text()) | {"tune_seconds": round(seconds, 1), "compared": rows}
    args.out.write_text(json.dumps(values, indent=1) + "\n")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
