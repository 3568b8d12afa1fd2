"""The record of one compiled model: its graphs, its graph breaks, and the notes that reports are made from."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
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
    """All that a report needs. It lives as long as the model, or as Dynamo's compiled code where that has none."""

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
    """Calls of parts of a model that breaks no graph, since it was last captured whole."""


class _Reference:
    """How the object that torch.compile returned knows its record. A copy of that object has a record of its own.

    Torch keeps that object until `torch._dynamo.reset()`. So the reference is weak where the model keeps the record:
    a model that is deleted takes its graphs and caches with it.
    """

    def __init__(self, record: Record | None = None, weak: bool = False) -> None:
        self._strong = None if weak else record
        self._weak = weakref.ref(record) if record is not None else None

    def record(self) -> Record | None:
        return self._weak() if self._weak is not None else None

    def __reduce__(self) -> tuple[type[_Reference], tuple[()]]:
        return _Reference, ()


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
        record = _record_of(wrapper)
    if record is None:
        record = Record(config)
        if wrapper is not None:
            setattr(wrapper, _ATTRIBUTE, _Reference(record))
        if module is not None:
            keep_with(record, [module], wrapper)
    return record


def keep_with(record: Record, modules: Iterable[nn.Module], wrapper: Any) -> None:
    """Let a record live as long as one of these modules, or what Dynamo calls, and no longer."""
    for module in modules:
        kept = _by_module.setdefault(module, [])
        if not any(record is other for other in kept):
            kept.append(record)
        if wrapper is not None:
            setattr(wrapper, _ATTRIBUTE, _Reference(record, weak=True))


def find_record(wrapper: Any, module: nn.Module | None) -> Record | None:
    """The record of a compiled model, by its wrapper or else its module; None before its first call."""
    record = _record_of(wrapper)
    if record is not None or module is None:
        return record
    wanted = MoecaConfig.from_options(wrapper.kwargs.get("options")) if wrapper is not None else None
    records = _by_module.get(module, [])
    return next((r for r in reversed(records) if wanted is None or r.config == wanted), None)


def _record_of(wrapper: Any) -> Record | None:
    reference = getattr(wrapper, _ATTRIBUTE, None)
    return reference.record() if isinstance(reference, _Reference) else None
