"""The command that samples with and without caching, and prints speed-ups and quality."""

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.testbed import ranks
from examples.testbed.arguments import guidance_scale, output_file, usable_device, whole_number
from examples.testbed.checkpoint import CheckpointError
from examples.testbed.classifier import Classifier
from examples.testbed.compare import (
    BASELINE,
    UNCACHED,
    Policy,
    Row,
    Setting,
    as_json,
    compiled_policy,
    environment,
    make_rows,
    run_paired,
    step_reductions,
    warm_up,
    warmup_steps,
)
from examples.testbed.data import of_classes
from examples.testbed.metrics import frechet_distance
from examples.testbed.model import MoEDiT
from examples.testbed.picture import save_picture
from examples.testbed.sampling import SAMPLERS, TRAIN_TIMESTEPS
from examples.testbed.testbed import Testbed
from moeca_compile.config import RECIPES, MoecaConfig
from moeca_compile.options import ConfigError

DEFAULT_RECIPES = ("auto", "moeca", "moeca-forecast")
HEADERS = (
    "over torch.compile",
    "over uncached",
    "FLOPs",
    "PSNR dB",
    "SSIM",
    "agreement",
    "Frechet",
    "warm-up s",
)
PICTURE = "samples.png"
PICTURE_FORMATS = (".png", ".pdf", ".svg", ".jpg")


def parse_arguments(testbed: Testbed, argv: list[str] | None = None, text: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0, help="seed of the first generation")
    parser.add_argument("--steps", type=whole_number(1, TRAIN_TIMESTEPS), default=50, help="sampling steps (50)")
    parser.add_argument("--batch", type=whole_number(2), default=20, help="images in a generation (20)")
    parser.add_argument("--repeats", type=whole_number(1), default=2, help="timed generations of each policy (2)")
    parser.add_argument(
        "--recipe",
        action="append",
        choices=list(RECIPES),
        metavar="NAME",
        help=f"a recipe, may be given several times: {', '.join(RECIPES)} ({', '.join(DEFAULT_RECIPES)})",
    )
    parser.add_argument("--full-every", type=whole_number(1), default=4, help="a full step every N steps (4)")
    parser.add_argument("--schedule", choices=("uniform", "power", "tapered"), help="(the recipe's own)")
    parser.add_argument(
        "--corrector",
        action="store_true",
        help="full steps make up for the cache steps before them (deterministic samplers)",
    )
    guidance = f"classifier-free guidance ({testbed.guidance:g})"
    parser.add_argument("--guidance", type=guidance_scale, default=testbed.guidance, help=guidance)
    parser.add_argument("--sampler", choices=SAMPLERS, default="euler", help="diffusers' scheduler (euler)")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable_device, default=default_device, help=f"({default_device})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--lowering", choices=("inductor", "eager"), default="inductor", help="eager compiles nothing, for a try"
    )
    parser.add_argument("--json", type=output_file(), metavar="FILE", help="write the table as JSON too")
    parser.add_argument(
        "--out",
        type=output_file(*PICTURE_FORMATS),
        default=str(testbed.folder / PICTURE),
        metavar="PICTURE",
        help=f"({PICTURE} beside the script)",
    )
    parser.add_argument("--checkpoint", type=Path, default=testbed.model_path, help="weights of the model")
    args = parser.parse_args(argv)
    args.recipe = list(dict.fromkeys(args.recipe or DEFAULT_RECIPES))
    args.options: dict[str, object] = {"full_every": args.full_every}
    if args.corrector:
        args.options["corrector"] = True
    if args.schedule is not None:
        args.options["schedule"] = args.schedule
    try:
        for recipe in args.recipe:
            MoecaConfig.from_options({"recipe": recipe} if recipe == UNCACHED else {"recipe": recipe, **args.options})
    except ConfigError as error:
        parser.error(str(error))
    return args


def make_policies(model: MoEDiT, args: argparse.Namespace, setting: Setting, progress: Progress) -> list[Policy]:
    """Compile the baseline and each recipe, then add runs with fewer steps at the FLOPs of the cheapest recipe."""
    names = [BASELINE, *dict.fromkeys([UNCACHED, *args.recipe])]
    policies = [compiled_policy(model, name, setting) for name in names]
    task = progress.add_task("", total=sum(map(warmup_steps, policies)))
    for policy in policies:
        progress.update(task, description=f"compile {policy.name}")
        warm_up(policy, setting, args.device, lambda: progress.advance(task))
    cached = [policy for policy in policies if policy.name not in (BASELINE, UNCACHED)]
    target = max(cached, key=lambda policy: (policy.name.startswith("moeca"), policy.flops_speedup), default=None)
    return policies + ([] if target is None else list(step_reductions(policies[0], target, setting)))


def run(model: MoEDiT, args: argparse.Namespace, setting: Setting, console: Console) -> list[Policy]:
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        policies = make_policies(model, args, setting, progress)
        total = setting.repeats * sum(policy.steps for policy in policies)
        task = progress.add_task("", total=total)
        run_paired(
            policies,
            setting,
            args.device,
            lambda name: progress.update(task, advance=1, description=f"sample {name}"),
        )
        progress.update(task, description="sample")
    return policies


def make_table(rows: list[Row], setting: Setting, real_frechet: float) -> Table:
    """The table to print. ``real_frechet`` is the Frechet distance of real images, about the best possible."""
    images = setting.batch * setting.repeats
    table = Table(
        title=f"{images} images, {setting.sampler}, {setting.steps} steps, guidance {setting.guidance:g}",
        caption="Wall-clock speed-ups are medians of paired runs. PSNR and SSIM are to plain torch.compile "
        "with the same seeds. Frechet distance is in the classifier's features to held-out images; "
        f"as many training images score {real_frechet:.2f}.",
    )
    table.add_column("policy", no_wrap=True)
    for header in HEADERS:
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            row.policy,
            f"{row.speedup_over_compile:.2f}x",
            f"{row.speedup_over_uncached:.2f}x",
            f"{row.flops_speedup:.2f}x",
            "-" if row.policy == BASELINE else f"{row.psnr:.1f}",
            "-" if row.policy == BASELINE else f"{row.ssim:.4f}",
            f"{row.agreement:.1%}",
            f"{row.frechet:.2f}",
            f"{row.warmup_seconds:.1f}" if row.warmup_seconds else "-",
        )
    return table


def main(testbed: Testbed, argv: list[str] | None = None, text: str | None = None) -> int:
    """Sample and compare. ``text`` is what --help says first. Returns the exit status."""
    args = parse_arguments(testbed, argv, text)
    try:
        model, classifier = testbed.load_model(args.checkpoint), testbed.load_classifier()
    except CheckpointError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 1
    with ranks.joined(args.device) as args.device:
        if args.batch < ranks.count():
            print(f"sample.py: --batch {args.batch} is less than one image a process", file=sys.stderr)
            return 1
        compare(testbed, model, classifier, args)
    return 0


def compare(testbed: Testbed, model: MoEDiT, classifier: Classifier, args: argparse.Namespace) -> None:
    """Run all policies; the first rank prints and writes what was found."""
    console = Console(quiet=not ranks.is_first())
    if not console.is_terminal:
        console = Console(width=120, quiet=not ranks.is_first())
    setting = Setting(
        testbed.image_shape,
        args.batch,
        args.steps,
        args.guidance,
        args.sampler,
        args.seed,
        args.repeats,
        args.options,
        args.lowering,
        ranks.count(),
    )
    dtype = getattr(torch, args.dtype)
    where = environment(args.device, dtype)
    console.print(", ".join(f"{name} {value}" for name, value in where.items()), highlight=False)
    policies = run(model.to(args.device, dtype), args, setting, console)
    if ranks.is_first():
        write(testbed, policies, setting, classifier, where, args, console)


def write(
    testbed: Testbed,
    policies: list[Policy],
    setting: Setting,
    classifier: Classifier,
    where: dict[str, str | int],
    args: argparse.Namespace,
    console: Console,
) -> None:
    """Print the table, and write the figures and the picture."""
    train, held_out = testbed.load_split()
    rows = make_rows(policies, setting, classifier, held_out.images)
    real = of_classes(train, setting.labels.repeat(setting.repeats))
    console.print(make_table(rows, setting, frechet_distance(classifier, real, held_out.images)))
    if args.json:
        args.json.write_text(json.dumps(as_json(rows, setting, where), indent=2) + "\n")
    shown = [policy for policy in policies if policy.name not in (BASELINE, UNCACHED)]
    save_picture(args.out, policies[0], shown, rows)
    console.print(f"wrote {args.out}" + (f" and {args.json}" if args.json else ""))
