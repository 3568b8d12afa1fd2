"""The file that `moeca_compile.tune` writes, as far as options need it: a schedule, or all options, and for what.

Checks here raise ValueError with a message that says what to do; `options` makes ConfigErrors of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

FORM = "moeca_tuned"
"""The field that every such file has, with the number of its format."""
FORMAT = 1
_AGAIN = "write it anew by moeca_compile.tune(...).save(path)"


class Calibrated(NamedTuple):
    """Full steps that were found for generations of so many steps."""

    steps: int
    full_steps: tuple[int, ...]
    """In ascending order, from 0."""

    def over(self, steps: int) -> tuple[int, ...]:
        """The full steps spread alike over a generation of another length, about as close together."""
        if steps == self.steps:
            return self.full_steps
        known, scale = (*self.full_steps, self.steps), steps / self.steps
        count = max(1, round(len(self.full_steps) * scale))
        places = []
        for i in range(count):
            whole, part = divmod(i * len(self.full_steps) / count, 1)
            before, after = known[int(whole)], known[int(whole) + 1]
            places.append(round(scale * (before + part * (after - before))))
        return apart(places, steps)


class Fingerprint(NamedTuple):
    """The structure of a model: the number of its parameters, that of their elements, and a hash of all shapes."""

    parameters: int
    elements: int
    shapes: str

    def __str__(self) -> str:
        return f"{self.parameters} parameters with {self.elements:,} elements"


class TunedFor(NamedTuple):
    """The options of a file, and what they were tuned for."""

    path: str
    options: tuple[tuple[str, Any], ...]
    model: Fingerprint
    steps: int
    versions: tuple[tuple[str, str], ...]
    """Of torch and of this package."""


def apart(places: list[int], steps: int) -> tuple[int, ...]:
    """Numbers of steps near `places`, from 0, each above the one before, with room for all within `steps`."""
    found = [0]
    for i in range(1, len(places)):
        found.append(min(max(found[-1] + 1, places[i]), steps - len(places) + i))
    return tuple(found)


def fingerprint(model: nn.Module) -> Fingerprint:
    """That of a model, whatever wraps it."""
    shapes = [tuple(weight.shape) for weight in model.parameters()]
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
    return Fingerprint(len(shapes), sum(map(math.prod, shapes)), digest)


def versions() -> dict[str, str]:
    """Those that times depend on."""
    import moeca_compile

    return {"torch": str(torch.__version__), "moeca_compile": moeca_compile.__version__}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a file. Raises ValueError where it cannot be read, is damaged, or is none of these files."""
    where = Path(path).expanduser()
    try:
        values = json.loads(where.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {where}") from None
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{where} is damaged ({error}): {_AGAIN}") from None
    if not isinstance(values, dict) or FORM not in values:
        raise ValueError(f"{where} is not of moeca_compile.tune: {_AGAIN}")
    if values[FORM] != FORMAT:
        raise ValueError(f"{where} has format {values[FORM]!r} and this version reads {FORMAT}: {_AGAIN}")
    return values


def _damaged(path: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({type(error).__name__}: {error}): {_AGAIN}")


def tuned_for(path: str | os.PathLike[str]) -> TunedFor:
    """What the options of a file are. Raises ValueError as `read`."""
    values, where = read(path), os.path.abspath(os.path.expanduser(os.fspath(path)))
    try:
        model, known = values["model"], values["versions"]
        wanted = Fingerprint(int(model["parameters"]), int(model["elements"]), str(model["shapes"]))
        options = tuple((str(name), hashable(value)) for name, value in values["options"].items())
        pairs = tuple((str(name), str(version)) for name, version in known.items())
        return TunedFor(where, options, wanted, int(values["steps"]), pairs)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _damaged(where, error) from None


def schedule_of(path: str | os.PathLike[str], full_every: int) -> Calibrated:
    """The calibrated schedule of a file with one step in `full_every` full.

    Raises ValueError as `read`, and where the file has none.
    """
    values = read(path)
    try:
        steps, known = int(values["steps"]), values["schedules"]
        full = math.ceil(steps / full_every)
        listed = range(steps) if full == steps else known.get(str(full))
        if listed is not None:
            return calibrated({"steps": steps, "full_steps": list(listed)})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _damaged(path, error) from None
    raise ValueError(
        f"{path} has no schedule with {full} full steps in {steps}, which full_every={full_every} asks for. "
        + (f"It has those with {', '.join(known)}" if known else "Nothing could be calibrated when it was tuned")
    )


def calibrated(value: Any) -> Calibrated:
    """A schedule from its plain values. Raises ValueError where it is none."""
    fields = value if isinstance(value, Mapping) else value._asdict()
    steps, listed = fields["steps"], tuple(fields["full_steps"])
    numbers = all(isinstance(step, int) and not isinstance(step, bool) for step in (steps, *listed))
    if not (numbers and listed and listed[0] == 0 and sorted(set(listed)) == [*listed] and listed[-1] < steps):
        raise ValueError("full_steps must ascend from 0, and be fewer than steps")
    return Calibrated(steps, listed)


def hashable(value: Any) -> Any:
    """A value from a JSON file in a form that a frozen config may hold: a schedule, or tuples for lists."""
    if isinstance(value, Mapping):
        return calibrated(value)
    return tuple(map(hashable, value)) if isinstance(value, list) else value
