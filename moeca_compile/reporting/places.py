"""Where the code of regions is written."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path

from torch import nn


def places_of(model: nn.Module | None, names: Iterable[str]) -> dict[str, str]:
    """file:line of the forward of each module of these names, or of the next one around it that is not torch's.

    A name is left out where no such forward is written in Python.
    """
    if model is None:
        return {}
    modules = dict(model.named_modules())
    found = {name: _place(model, modules, name.split(".")) for name in names}
    return {name: place for name, place in found.items() if place is not None}


def _place(model: nn.Module, modules: dict[str, nn.Module], parts: list[str]) -> str | None:
    around = (modules.get(".".join(parts[:length])) for length in range(len(parts), -1, -1))
    own = (each for each in around if each is not None and not type(each).__module__.startswith("torch."))
    codes = (getattr(inspect.unwrap(type(each).forward), "__code__", None) for each in (*own, model))
    code = next((code for code in codes if code is not None), None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}" if code is not None else None
