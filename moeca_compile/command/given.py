"""What `moeca bench` is given, checked before any work."""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from moeca_compile.command.named import CommandError
from moeca_compile.config import MoecaConfig
from moeca_compile.options import ConfigError

DEFAULT_RECIPES = ("moeca", "stack-forecast")
PICTURE_FORMATS = (".png", ".pdf", ".svg", ".jpg")
Recipes = Mapping[str, Mapping[str, Any]]
"""The options for torch.compile of each recipe, by the name of its row."""


def recipes_of(given: Sequence[str], options: Sequence[str]) -> Recipes:
    """The recipes, each by name or as "name option=value ...", with `options` for all of them.

    Raises CommandError for a recipe, an option or a value that is not allowed.
    """
    for_all, chosen = dict(map(_option, options)), {}
    for spec in given or DEFAULT_RECIPES:
        recipe, *own = _words(spec)
        chosen[" ".join([recipe, *own])] = {"recipe": recipe, **for_all, **dict(map(_option, own))}
    for found in chosen.values():
        try:
            MoecaConfig.from_options(found)
        except ConfigError as error:
            raise CommandError(str(error)) from error
    return chosen


def _words(spec: str) -> list[str]:
    try:
        return shlex.split(spec) or [""]
    except ValueError as error:
        raise CommandError(f"--recipe {spec!r}: {error}") from error


def _option(text: str) -> tuple[str, Any]:
    """An option's name and value: a number, True or true, a list, None or null; else the text itself."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise CommandError(f"{text!r} is no option=value, such as full_every=5")
    for read in (ast.literal_eval, json.loads):
        try:
            return name, read(value)
        except (ValueError, SyntaxError):
            continue
    return name, value


def seeds_of(text: str) -> tuple[int, ...]:
    """Seeds from a list with commas. Raises CommandError for anything but different whole numbers from 0 on."""
    try:
        seeds = tuple(int(each) for each in text.split(","))
    except ValueError:
        seeds = (-1,)
    if min(seeds) < 0 or max(seeds) >= 2**63 or len(set(seeds)) < len(seeds):
        raise CommandError(f"--seeds {text}: give different whole numbers from 0 on, such as 0,1,2")
    return seeds


def device_of(name: str) -> torch.device:
    """A CPU or CUDA device. Raises CommandError where it cannot be used here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {name}: give cpu or cuda")
    return device


def file_for(option: str, name: str, forms: Sequence[str]) -> Path:
    """The file that an option names. Raises CommandError where it cannot be written."""
    path = Path(name).expanduser()
    if path.suffix.lower() not in forms:
        raise CommandError(f"{option} {name}: the name must end in {' or '.join(forms)}")
    if not path.parent.is_dir():
        raise CommandError(f"{option} {name}: there is no folder {path.parent}")
    if path.is_dir():
        raise CommandError(f"{option} {name} is a folder. Name a file in it")
    return path


def picture_file(name: str) -> Path:
    """Where to draw samples. Raises CommandError where that cannot be done."""
    if find_spec("matplotlib") is None:
        raise CommandError("--picture needs matplotlib, which is not installed")
    return file_for("--picture", name, PICTURE_FORMATS)
