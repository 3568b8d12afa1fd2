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
        print(_env() if given.command == "env" else _explain(given))
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
    commands.add_parser("env", help="versions, devices and kernels, for bug reports")
    return parser


def _env() -> str:
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
