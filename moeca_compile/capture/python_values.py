"""What experts hold beside tensors and modules: numbers, flags, and lists and dicts of these that their code reads.

One expert's code is traced for all of them, so Dynamo guards the values of that one alone. Those of the others may
change later: a factor, or the scale of an adapter, which is set in place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from weakref import ref

from torch import nn

from moeca_compile.capture.running.own_code import attributes_read, attributes_stored
from moeca_compile.capture.source import innermost, is_torchs, namespace_of
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
    by_name = _codes(kind)
    read = frozenset().union(*(attributes_read(code) for codes in by_name.values() for code in codes))
    return read - _set_by_forward(by_name) - OF_ALL_MODULES


def _set_by_forward(by_name: dict[str, list[CodeType]]) -> frozenset[str]:
    """The attributes that are set by the forward and by the methods that it names, and so on."""
    reached: set[CodeType] = set()
    pending = list(by_name.get("forward", []))
    while pending:
        code = pending.pop()
        if code not in reached:
            reached.add(code)
            pending += [each for name in code.co_names for each in by_name.get(name, [])]
    return frozenset().union(*map(attributes_stored, reached))


def _codes(kind: type) -> dict[str, list[CodeType]]:
    """The code of the methods and properties of a class by name, torch's own classes excepted."""
    found: dict[str, list[CodeType]] = defaultdict(list)
    for owner in kind.__mro__:
        if owner is not object and not is_torchs(owner):
            for name, value in namespace_of(owner).items():
                written: Callable[..., Any] = innermost(getattr(value, "fget", None) or value)
                if isinstance(written, FunctionType):
                    found[name].append(written.__code__)
    return found


def _frozen(value: Any) -> Any:
    """A value as it is now; _UNKNOWN for what is not plain."""
    if value is None or type(value) in (bool, int, float, str):
        return type(value), value  # 1 is not 1.0: an expert's code may tell them apart
    if isinstance(value, (list, tuple)):
        return list, tuple(map(_frozen, value))
    if isinstance(value, dict):
        return dict, tuple((key, _frozen(each)) for key, each in value.items())
    return _UNKNOWN
