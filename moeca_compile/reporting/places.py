"""Where the code of regions is written."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path

from torch import nn


def places_of(model: nn.Module | None, names: Iterable[str]) -> dict[str, str]:
    """file:line of the forward of each module of these names, or of the next one around it that is not torch's."""
    if model is None:
        return {}
    modules = dict(model.named_modules())
    return {name: _place(model, modules, name.split(".")) for name in names}


def _place(model: nn.Module, modules: dict[str, nn.Module], parts: list[str]) -> str:
    around = (modules.get(".".join(parts[:length])) for length in range(len(parts), -1, -1))
    known = (each for each in around if each is not None)
    own = next((each for each in known if not type(each).__module__.startswith("torch.")), model)
    code = inspect.unwrap(type(own).forward).__code__
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}"
