"""A picture of samples: those of the uncached model, and below them those of a recipe with fewer full steps.

python -m bench.samples --testbed emoji                                   # docs/images/samples-emoji.png
python -m bench.samples --testbed mnist --recipe stack-forecast --out samples.png

Steps run eagerly, as in bench.study. Titles say the FLOPs speed-up, and the mean of the images' PSNR.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from statistics import mean

import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor

from bench.study import TESTBEDS, Case, Setting, Study, pictures_of
from examples.testbed.arguments import guidance_scale, output_file, whole_number
from examples.testbed.checkpoint import CheckpointError
from examples.testbed.metrics import psnr
from examples.testbed.picture import show_samples
from moeca_compile.config import RECIPES

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
CLASSES = 10


def panels(study: Study, recipe: str, intervals: list[int], rows: int) -> Iterator[tuple[str, Tensor]]:
    """A title, and the same samples [10 * rows, C, S, S]: by the uncached model, then with each interval."""
    setting = Setting(images=CLASSES * rows, sets=1)
    (uncached,), _ = pictures_of(study, setting, Case("uncached"))
    yield f"uncached, {study.steps} steps", uncached
    for interval in intervals:
        told = {"sampler": "deterministic"} if "sampler" in RECIPES[recipe].options else {}
        case = Case(f"N = {interval}", {"recipe": recipe, "full_every": interval, **told})
        (cached,), costs = pictures_of(study, setting, case)
        near = mean(psnr(one[None], other[None]) for one, other in zip(cached, uncached, strict=True))
        yield f"{recipe}, {costs.flops_speedup:.1f}x fewer FLOPs, {near:.1f} dB", cached


def draw(shown: list[tuple[str, Tensor]], path: Path) -> None:
    figure, grid = plt.subplots(len(shown), 1, squeeze=False, layout="constrained", figsize=(8, 1.9 * len(shown)))
    for axes, (title, images) in zip(grid.flat, shown, strict=True):
        axes.set_axis_off()
        show_samples(axes, images, title, columns=CLASSES)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=120)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)  # a file of a third of the size


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--testbed", choices=list(TESTBEDS), required=True)
    parser.add_argument("--recipe", choices=list(RECIPES), default="auto", help="(auto)")
    every = {"type": whole_number(1), "nargs": "*", "default": [3, 5], "metavar": "N"}
    parser.add_argument("--full-every", **every, help="a full step every N steps, of each panel (3 5)")
    parser.add_argument("--rows", type=whole_number(1), default=2, help="samples of each class (2)")
    parser.add_argument("--steps", type=whole_number(2, 1000), default=50, help="sampling steps (50)")
    parser.add_argument("--guidance", type=guidance_scale, help="classifier-free guidance (the testbed's)")
    parser.add_argument("--checkpoint", type=Path, help="weights of the model (the testbed's)")
    parser.add_argument("--threads", type=whole_number(1), default=1, help="threads of torch (1)")
    parser.add_argument(
        "--out", type=output_file(".png"), help=f"({IMAGES.relative_to(IMAGES.parents[1])}/samples-NAME.png)"
    )
    args = parser.parse_args(argv)
    args.testbed = TESTBEDS[args.testbed]
    args.checkpoint = args.checkpoint or args.testbed.model_path
    args.guidance = args.testbed.guidance if args.guidance is None else args.guidance
    args.out = args.out or IMAGES / f"samples-{args.testbed.name}.png"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    study = Study(args.testbed, args.checkpoint, args.steps, args.guidance, torch.device("cpu"))
    try:
        draw(list(panels(study, args.recipe, args.full_every, args.rows)), args.out)
    except CheckpointError as error:
        print(f"samples.py: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
