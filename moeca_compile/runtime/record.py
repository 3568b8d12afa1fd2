"""The record of one compiled model: its graphs, its graph breaks, and the notes that reports are made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from moeca_compile.config import MoecaConfig
from moeca_compile.notes import Notes
from moeca_compile.runtime.engine import Engine
from moeca_compile.runtime.streams import Bounds, bounds_of


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
    tried_again: dict[int, CodeType] = field(default_factory=dict)
    """Code that Dynamo had given up on, and that the backend made it trace again. By id: code that Dynamo writes may
    have a dict among its constants, and then has no hash."""

    @cached_property
    def bounds(self) -> Bounds:
        """Of the caches of all its graphs that are the whole model, with their requests."""
        return bounds_of(self.config)


_by_wrapper = WeakIdKeyDictionary()
"""By identity, since equal options make equal wrappers. No attribute of the wrapper, which users copy and pickle."""
_by_module: WeakKeyDictionary[nn.Module, list[Record]] = WeakKeyDictionary()


def record_for(wrapper: Any, module: nn.Module | None, config: MoecaConfig) -> Record:
    """The record of the model that is being compiled; created at its first compilation.

    It is kept by the object that torch.compile made (there is none under some wrappers), and also by module: a module
    that is compiled twice with equal options has two such objects, but Dynamo compiles it once.
    """
    if wrapper is None:
        known = _by_module.get(module, []) if module is not None else []
        record = next((r for r in known if r.config == config), None)
    else:
        record = _by_wrapper.get(wrapper)
    if record is None:
        record = Record(config)
        if wrapper is not None:
            _by_wrapper[wrapper] = record
        if module is not None:
            _by_module.setdefault(module, []).append(record)
    return record


def find_record(wrapper: Any, module: nn.Module | None) -> Record | None:
    """The record of a compiled model, by its wrapper or else its module; None before its first call."""
    record: Record | None = _by_wrapper.get(wrapper) if wrapper is not None else None
    if record is not None or module is None:
        return record
    wanted = MoecaConfig.from_options(wrapper.kwargs.get("options")) if wrapper is not None else None
    records = _by_module.get(module, [])
    return next((r for r in reversed(records) if wanted is None or r.config == wanted), None)
