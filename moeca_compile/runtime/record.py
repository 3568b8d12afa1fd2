"""The record of one compiled model: its graphs, its graph breaks, and the notes that reports are made from."""

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
    """All that a report needs. It lives as long as the compiled model."""

    config: MoecaConfig
    notes: Notes = field(default_factory=Notes)
    engines: list[Engine] = field(default_factory=list)
    untouched: int = 0
    """Number of graphs that run as under plain torch.compile."""
    breaks: list[tuple[str, str]] = field(default_factory=list)
    partial: bool = False
    """Whether the last graph is only a part of the model, called from plain Python."""
    tried_again: set[CodeType] = field(default_factory=set)
    """Code that Dynamo had given up on, and that the backend made it trace again."""
    stale_calls: int = 0
    """Calls of parts of the model since it was last captured whole."""


_ATTRIBUTE = "_moeca_record"
_by_module: WeakKeyDictionary[nn.Module, list[Record]] = WeakKeyDictionary()


def record_for(wrapper: Any, module: nn.Module | None, config: MoecaConfig) -> Record:
    """The record of the model that is being compiled; created at its first compilation.

    It is stored as an attribute of the object that torch.compile returned (there is none under some wrappers), and
    also by module: a module that is compiled twice with equal options has two such objects, but Dynamo compiles it
    once.
    """
    if wrapper is None:
        known = _by_module.get(module, []) if module is not None else []
        record = next((r for r in known if r.config == config), None)
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
    """The record of a compiled model, by its wrapper or else its module; None before its first call."""
    record: Record | None = getattr(wrapper, _ATTRIBUTE, None)
    if record is not None or module is None:
        return record
    wanted = MoecaConfig.from_options(wrapper.kwargs.get("options")) if wrapper is not None else None
    records = _by_module.get(module, [])
    return next((r for r in reversed(records) if wanted is None or r.config == wanted), None)
