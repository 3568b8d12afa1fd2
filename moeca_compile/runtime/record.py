"""The record of one compiled model: its graphs, its graph breaks, and the notes that reports are made from."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from moeca_compile.config import MoecaConfig
from moeca_compile.lower.parts import Parts
from moeca_compile.lower.passed_sizes import PassedSizes
from moeca_compile.notes import Notes
from moeca_compile.runtime.engine import Engine
from moeca_compile.runtime.streams import Bounds, bounds_of


@dataclass
class Record:
    """All that a report needs. It lives as long as the model, or as Dynamo's compiled code where that has none."""

    config: MoecaConfig
    notes: Notes = field(default_factory=Notes)
    engines: list[Engine] = field(default_factory=list)
    untouched: int = 0
    """Number of graphs that run as under plain torch.compile."""
    parts: Parts = field(default_factory=Parts)
    """The compiled parts of all its graphs."""
    passed: PassedSizes = field(default_factory=PassedSizes)
    """Where the rewrite of its graphs has passed validation."""
    breaks: list[tuple[str, str]] = field(default_factory=list)
    partial: bool = False
    """Whether the last graph is only a part of the model, called from plain Python."""
    tried_again: dict[int, CodeType] = field(default_factory=dict)
    """Code that Dynamo had given up on, and that the backend made it trace again. By id: code that Dynamo writes may
    have a dict among its constants, and then has no hash."""
    stale_calls: int = 0
    """Calls of parts of a model that breaks no graph, since it was last captured whole."""

    def __post_init__(self) -> None:
        self.notes.progress.quiet = not self.config.progress

    @cached_property
    def bounds(self) -> Bounds:
        """Of the caches of all its graphs that are the whole model, with their requests."""
        return bounds_of(self.config)


_by_wrapper = WeakIdKeyDictionary()
"""A function that gives the record. By identity, since equal options make equal wrappers. No attribute of the
wrapper, which users copy and pickle.

Torch keeps that object until `torch._dynamo.reset()`. So the reference is weak where the model keeps the record: a
model that is deleted takes its graphs and caches with it.
"""
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
        record = _record_of(wrapper)
    if record is None:
        record = Record(config)
        if wrapper is not None:
            _by_wrapper[wrapper] = _held(record)
        if module is not None:
            keep_with(record, [module], wrapper)
    return record


def _held(record: Record) -> Callable[[], Record]:
    return lambda: record


def keep_with(record: Record, modules: Iterable[nn.Module], wrapper: Any) -> None:
    """Let a record live as long as one of these modules, or what Dynamo calls, and no longer."""
    for module in modules:
        kept = _by_module.setdefault(module, [])
        if not any(record is other for other in kept):
            kept.append(record)
        if wrapper is not None:
            _by_wrapper[wrapper] = weakref.ref(record)


def forget(record: Record) -> None:
    """Drop a record's compiled steps, caches and CUDA graphs, and keep it no longer with any module."""
    for engine in record.engines:
        for loop in list(engine.loops.values()):
            engine.forget(loop)
    for module, kept in list(_by_module.items()):
        kept[:] = [other for other in kept if other is not record]
        if not kept:
            del _by_module[module]


def find_record(wrapper: Any, module: nn.Module | None) -> Record | None:
    """The record of a compiled model, by its wrapper or else its module; None before its first call."""
    record = _record_of(wrapper)
    if record is not None or module is None:
        return record
    wanted = MoecaConfig.from_options(wrapper.kwargs.get("options")) if wrapper is not None else None
    records = _by_module.get(module, [])
    return next((r for r in reversed(records) if wanted is None or r.config == wanted), None)


def _record_of(wrapper: Any) -> Record | None:
    known: Callable[[], Record | None] | None = _by_wrapper.get(wrapper) if wrapper is not None else None
    return known() if known is not None else None
