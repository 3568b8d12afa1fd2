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
    tune = commands.add_parser("tune", help="find options for a model and a sampling loop, by measuring")
    tune.add_argument("factory", metavar="module:factory", help="returns the model, or a tuple that begins with it")
    tune.add_argument("sample", metavar="module:sample", help="gets a model and a seed; returns the outputs")
    wish = tune.add_mutually_exclusive_group()
    wish.add_argument("--speedup", type=float, metavar="X", help="so many times faster than uncached (4)")
    wish.add_argument("--psnr", type=float, metavar="DB", help="so near to the uncached outputs")
    wish.add_argument("--seconds", type=float, metavar="S", help="so long a generation")
    tune.add_argument("--seeds", type=int, default=8, metavar="N", help="how many (8)")
    tune.add_argument("--steps", type=int, metavar="N", help="of a generation; found if not given")
    tune.add_argument("--recipe", action="append", metavar="R", help="may be given again")
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

    known = environment()
    width = max(map(len, known))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in known.items())


def _explain(given: argparse.Namespace) -> str:
    from moeca_compile.command.explain import explain, subject_named
    from moeca_compile.command.explanation import text_of
    from moeca_compile.policies import RECIPES

    wrong = [recipe for recipe in given.recipe or () if recipe not in RECIPES]
    if wrong:
        raise CommandError(f"there is no recipe {wrong[0]!r}. The recipes are {', '.join(RECIPES)}")
    recipes = list(dict.fromkeys(given.recipe or (recipe for recipe in RECIPES if recipe != "none")))
    return text_of(explain(subject_named(given.factory, given.inputs, given.device), recipes))


def _tune(given: argparse.Namespace) -> str:
    from moeca_compile.command.tune import tuned

    known = {name: value for name in ("speedup", "psnr", "seconds") if (value := getattr(given, name)) is not None}
    more = {"seeds": given.seeds, "steps": given.steps, "resume": given.resume}
    more |= {"recipes": given.recipe} if given.recipe else {}
    return tuned(given.factory, given.sample, given.out, known or {"speedup": 4.0}, **more)


_RUN = {"explain": _explain, "tune": _tune, "report": _report, "cache": _cache, "env": _env}
