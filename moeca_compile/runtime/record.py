"""What is known of one compiled model: its graphs and breaks, and the notes that reports are made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from moeca_compile.config import MoecaConfig
from moeca_compile.notes import Notes
from moeca_compile.runtime.engine import Engine


@dataclass
class Record:
    """It lives and dies with the compiled model."""

    config: MoecaConfig
    notes: Notes = field(default_factory=Notes)
    engines: list[Engine] = field(default_factory=list)
    untouched: int = 0
    """Graphs that run as torch.compile would run them."""
    breaks: list[tuple[str, str]] = field(default_factory=list)
    partial: bool = False
    """Whether the last graph is a part of the model, whose callers run as plain Python."""
    tried_again: set[CodeType] = field(default_factory=set)
    """Code that Dynamo had given up, and was made to look at again."""


_ATTRIBUTE = "_moeca_record"
_by_module: WeakKeyDictionary[nn.Module, list[Record]] = WeakKeyDictionary()


def record_for(wrapper: Any, module: nn.Module | None, config: MoecaConfig) -> Record:
    """The record of the compilation under way, made when it is the first of its compiled model.

    It is kept on the object that torch.compile made, if one did, and beside the module: a module that is compiled
    twice with equal options has two such objects, but Dynamo compiles it once.
    """
    if wrapper is None:
        record = next((r for r in _by_module.get(module, []) if r.config == config), None) if module else None
    else:
        record = getattr(wrapper, _ATTRIBUTE, None)
    if record is None:
        record = Record(config)
        if wrapper is not None:
            setattr(wrapper, _ATTRIBUTE, record)
        if module is not None:
            _by_module.setdefault(module, []).append(record)
    return record


def find_record(wrapper: Any, module: nn.Module | None) -> Record | None:
    """The record of a compiled model, by either of the two; None before its first call."""
    record: Record | None = getattr(wrapper, _ATTRIBUTE, None)
    if record is not None or module is None:
        return record
    wanted = MoecaConfig.from_options(wrapper.kwargs.get("options")) if wrapper is not None else None
    records = _by_module.get(module, [])
    return next((r for r in reversed(records) if wanted is None or r.config == wanted), None)
