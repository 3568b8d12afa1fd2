"""Types for argparse whose error messages say what is allowed."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch


def whole_number(low: int, high: float = math.inf) -> Callable[[str], int]:
    """An argparse type: a whole number from ``low`` to ``high``."""

    def parse(text: str) -> int:
        allowed = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give a whole number {allowed}")
        return value

    return parse


def guidance_scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give a number >= 0 (1 is no guidance)")
    return value


def usable_device(text: str) -> torch.device:
    if text.split(":")[0] not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give cpu or cuda")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {error}") from None
    return device


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """An argparse type: a file in an existing folder, with one of ``suffixes`` if any are given."""

    def parse(text: str) -> Path:
        path = Path(text)
        if suffixes and path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r}: the name must end in {' or '.join(suffixes)}")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {path.parent}")
        return path

    return parse
