"""The command `moeca`: its arguments, and what goes where."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from moeca_compile.command.named import CommandError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (those of the process if None). Returns its exit status.

    A mistake of the user's is status 2 and a message on stderr.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        print(_RUN[given.command](given))
    except CommandError as error:
        print(f"moeca {given.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moeca", description="Cached sampling from diffusion transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("explain", help="what would be cached of a model, and what that would cost")
    explain.add_argument("factory", metavar="module:factory", help="returns the model, or (model, inputs)")
    explain.add_argument(
        "--inputs", metavar="module:function", help="gets the model; returns a tuple or a dict of its arguments"
    )
    explain.add_argument("--recipe", action="append", metavar="R", help="may be given again; all if not given")
    explain.add_argument(
        "--device", default="cpu", choices=("cpu", "meta"), help="meta: shapes without data, for large models"
    )
    bench = commands.add_parser("bench", help="sample from a model by recipes, plain torch.compile and eager")
    bench.add_argument("factory", metavar="module:factory", help="returns the model")
    bench.add_argument("sample", metavar="module:sample", help="sample(model, seed) returns one generation's result")
    bench.add_argument(
        "--recipe", action="append", default=[], metavar="R", help="may be given again; 'R option=value' has its own"
    )
    bench.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of all recipes; may be given again"
    )
    bench.add_argument("--seeds", default="0,1,2", metavar="S,S,...", help="a timed generation each (0,1,2)")
    bench.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(as the factory makes the model)")
    bench.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (cpu)")
    bench.add_argument("--json", metavar="FILE", help="write all figures to this file, too")
    bench.add_argument("--picture", metavar="FILE", help="draw samples side by side to this .png, .pdf, .svg or .jpg")
    tune = commands.add_parser("tune", help="find options for a model and a sampling loop, by measuring")
    tune.add_argument("factory", metavar="module:factory", help="returns the model, or a tuple that begins with it")
    tune.add_argument("sample", metavar="module:sample", help="gets a model and a seed; returns the outputs")
    wish = tune.add_mutually_exclusive_group()
    wish.add_argument("--speedup", type=float, metavar="X", help="so many times faster than uncached (4)")
    wish.add_argument("--psnr", type=float, metavar="DB", help="so near to the uncached outputs")
    wish.add_argument("--seconds", type=float, metavar="S", help="so long a generation")
    tune.add_argument("--seeds", type=int, default=8, metavar="N", help="how many (8)")
    tune.add_argument("--steps", type=int, metavar="N", help="of a generation; found if not given")
    tune.add_argument(
        "--recipe", action="append", metavar="R", help="one whose full steps a schedule says; may be given again"
    )
    tune.add_argument("--out", default="tuned.json", metavar="FILE", help="(tuned.json)")
    tune.add_argument("--resume", metavar="FILE", help="keep rows here, and go on from them")
    report = commands.add_parser("report", help="show a report that report(model).save wrote")
    report.add_argument("file", metavar="FILE", help="the report as JSON")
    report.add_argument("--html", metavar="OUT", help="write the page with figures to this file instead")
    cache = commands.add_parser("cache", help="what earlier compilations have left on disk")
    actions = cache.add_subparsers(dest="action", required=True)
    actions.add_parser("info", help="where it is, how much, and of what kinds")
    clear = actions.add_parser("clear", help="remove it; the next process finds all out anew")
    clear.add_argument("--yes", action="store_true", help="do not ask")
    commands.add_parser("env", help="versions, devices and kernels, for bug reports")
    return parser


def _report(given: argparse.Namespace) -> str:
    from moeca_compile.command.report import shown, written

    return shown(given.file) if given.html is None else written(given.file, given.html)


def _cache(given: argparse.Namespace) -> str:
    from moeca_compile.command.cache import clear, info

    return info() if given.action == "info" else clear(given.yes)


def _env(given: argparse.Namespace) -> str:
    from moeca_compile.command.env import environment
    from moeca_compile.text import aligned

    return "\n".join(aligned([*environment().items()]))


def _explain(given: argparse.Namespace) -> str:
    from moeca_compile.command.explain import explain, subject_named
    from moeca_compile.command.explanation import text_of
    from moeca_compile.policies import RECIPES

    wrong = [recipe for recipe in given.recipe or () if recipe not in RECIPES]
    if wrong:
        raise CommandError(f"there is no recipe {wrong[0]!r}. The recipes are {', '.join(RECIPES)}")
    recipes = list(dict.fromkeys(given.recipe or (recipe for recipe in RECIPES if recipe != "none")))
    return text_of(explain(subject_named(given.factory, given.inputs, given.device), recipes))


def _bench(given: argparse.Namespace) -> str:
    from moeca_compile.command.bench import compare, subject_named
    from moeca_compile.command.comparison import save_picture, save_values, text_of
    from moeca_compile.command.given import device_of, file_for, picture_file, recipes_of, seeds_of

    values = file_for("--json", given.json, (".json",)) if given.json else None
    picture = picture_file(given.picture) if given.picture else None
    recipes, seeds = recipes_of(given.recipe, given.option), seeds_of(given.seeds)
    device = device_of(given.device)
    subject = subject_named(given.factory, given.sample, seeds, recipes, device, given.dtype)
    found = compare(subject, lambda line: print(line, file=sys.stderr, flush=True), need_pictures=picture is not None)
    lines = [text_of(found)]
    for path, save in ((values, save_values), (picture, save_picture)):
        try:
            if path is not None:
                save(found, path)
                lines.append(f"wrote {path}")
        except OSError as error:  # the table is there all the same
            lines.append(f"{path} cannot be written: {error.strerror}")
    return "\n".join(lines)


def _tune(given: argparse.Namespace) -> str:
    from moeca_compile.command.tune import tuned

    known = {name: value for name in ("speedup", "psnr", "seconds") if (value := getattr(given, name)) is not None}
    more = {"seeds": given.seeds, "steps": given.steps, "resume": given.resume}
    more |= {"recipes": given.recipe} if given.recipe else {}
    return tuned(given.factory, given.sample, given.out, known or {"speedup": 4.0}, **more)


_RUN = {"explain": _explain, "bench": _bench, "tune": _tune, "report": _report, "cache": _cache, "env": _env}
