"""What experts hold beside tensors and modules: numbers, flags, and lists and dicts of these that their code reads.

One expert's code is traced for all of them, so Dynamo guards the values of that one alone. Those of the others may
change later: a factor, or the scale of an adapter, which is set in place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from types import CodeType
from typing import Any, NamedTuple
from weakref import ref

from torch import nn

from moeca_compile.capture.running.own_code import attributes_read, attributes_stored, reached_among
from moeca_compile.capture.source import codes_of, is_torchs
from moeca_compile.capture.structure import OF_ALL_MODULES

_UNKNOWN = object()
"""In place of what is no plain value, such as a tensor."""


class Held(NamedTuple):
    """The values of one module that its code reads and its forward does not set."""

    module: ref[nn.Module]
    values: tuple[tuple[str, Any], ...]

    def same(self) -> bool:
        """Whether it holds the same values now."""
        module = self.module()
        if module is None:
            return False
        now = vars(module)
        return all(_frozen(now.get(name, _UNKNOWN)) == value for name, value in self.values)


def held_by_experts(layer: nn.Module) -> tuple[Held, ...]:
    """For the modules in experts, taken to be children of one class under one parent: those that hold such values."""
    names: dict[type, frozenset[str]] = {}
    found: dict[int, Held] = {}
    for expert in _experts(layer):
        for module in expert.modules():
            kind = type(module)
            if kind not in names:
                names[kind] = _read_and_not_set(kind)
            frozen = ((name, _frozen(vars(module)[name])) for name in sorted(names[kind] & vars(module).keys()))
            values = tuple((name, value) for name, value in frozen if value is not _UNKNOWN)
            if values:
                found[id(module)] = Held(ref(module), values)
    return tuple(found.values())


def _experts(layer: nn.Module) -> Iterator[nn.Module]:
    for parent in layer.modules():
        alike: dict[type, list[nn.Module]] = defaultdict(list)
        for child in parent.children():
            alike[type(child)].append(child)
        for children in alike.values():
            if len(children) > 1:
                yield from children


def _read_and_not_set(kind: type) -> frozenset[str]:
    """Attributes that the code of a class reads, but for those that its forward sets, as counters of calls."""
    by_name: dict[str, list[CodeType]] = defaultdict(list)
    for name, code in codes_of(kind, is_torchs):
        by_name[name].append(code)
    read = frozenset().union(*(attributes_read(code) for codes in by_name.values() for code in codes))
    return read.difference(OF_ALL_MODULES, *map(attributes_stored, reached_among(by_name)))


def _frozen(value: Any) -> Any:
    """A value as it is now; _UNKNOWN for what is not plain."""
    if value is None or type(value) in (bool, int, float, str):
        return type(value), value  # 1 is not 1.0: an expert's code may tell them apart
    if isinstance(value, (list, tuple)):
        return list, tuple(map(_frozen, value))
    if isinstance(value, dict):
        return dict, tuple((key, _frozen(each)) for key, each in value.items())
    return _UNKNOWN
