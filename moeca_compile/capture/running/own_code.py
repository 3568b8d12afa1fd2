"""What a layer's own code reads and leaves, by what is written in it: attributes, and variables around it."""

from __future__ import annotations

import dis
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from moeca_compile.capture.numerics import UntrustedError
from moeca_compile.capture.running.trace import snapshot, tensors_in
from moeca_compile.capture.source import functions_of

_CODE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType)
_LOADS, _STORES = ("LOAD_ATTR", "LOAD_METHOD"), ("STORE_ATTR",)


@contextmanager
def nothing_left(forward: Callable[..., Any], owner: type) -> Iterator[None]:
    """Raises UntrustedError if tensors or numbers are left outside of the layer, which others would miss."""
    reached = reached_from(forward, owner)
    functions = [each for each in functions_of(owner) if each.__code__ in reached]
    before = {place: snapshot(value) for place, value in _variables_around(functions)}
    yield
    for place, value in _variables_around(functions):
        if before[place] != snapshot(value):
            what = "a tensor" if tensors_in(value) else "something"
            raise UntrustedError(f"it leaves {what} in `{place[1]}`, outside of the layer")


def _variables_around(functions: list[FunctionType]) -> Iterator[tuple[tuple[int, str], Any]]:
    """((number, name), value) of what each function names outside of itself: functions may be of several files."""
    for number, function in enumerate(functions):
        for name in function.__code__.co_names:
            yield (number, name), function.__globals__.get(name)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            yield (number, name), cell.cell_contents


def reached_from(forward: Callable[..., Any], owner: type) -> set[CodeType]:
    """The code of the forward, and of the methods that it names, and so on."""
    by_name: dict[str, list[CodeType]] = defaultdict(list)
    for function in functions_of(owner):
        by_name[function.__name__].append(function.__code__)
    return reached_among(by_name)


def reached_among(by_name: Mapping[str, list[CodeType]]) -> set[CodeType]:
    """The same, among the code of methods by their names."""
    found: set[CodeType] = set()
    pending = list(by_name.get("forward", []))
    while pending:
        code = pending.pop()
        if code not in found:
            found.add(code)
            pending += [each for name in code.co_names for each in by_name.get(name, [])]
            pending += [each for each in code.co_consts if isinstance(each, CodeType)]
    return found


def numbers_read(layer: nn.Module) -> tuple[tuple[tuple[str, ...], Any], ...]:
    """(path, value) of the numbers and names, and lists of them, that the layer's own code reads, also of objects
    with its settings: they are in what was built. Not those that a call changes."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for path, module in layer.named_modules():
        codes = [each.__code__ for each in functions_of(type(module))]
        changed = set().union(*(_attributes(each, _STORES) for each in codes if each.co_name != "__init__"))
        read = set().union(*map(attributes_read, codes)) - changed
        found += _plain_within(module, tuple(path.split(".")) if path else (), read)
    return tuple(found)


def _plain_within(held: Any, path: tuple[str, ...], read: set[str], depth: int = 2) -> list[tuple[Any, Any]]:
    values = {name: vars(held)[name] for name in sorted(read & vars(held).keys())}
    found = [((*path, name), _frozen(value)) for name, value in values.items() if _is_plain(value)]
    for name, value in values.items() if depth else ():
        if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type, *_CODE)):
            found += _plain_within(value, (*path, name), read, depth - 1)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def is_same(held: Any, value: Any) -> bool:
    """Traceable: whether what is held now is what was frozen."""
    if not isinstance(value, tuple):
        return bool(held == value)
    for number, each in enumerate(value):
        if not is_same(held[number], each):
            return False
    return len(held) == len(value)


def attributes_read(code: CodeType) -> frozenset[str]:
    return _attributes(code, _LOADS)


def attributes_stored(code: CodeType) -> frozenset[str]:
    return _attributes(code, _STORES)


@cache
def _attributes(code: CodeType, ops: tuple[str, ...]) -> frozenset[str]:
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    found = {each.argval for each in dis.get_instructions(code) if each.opname in ops}
    return frozenset(found.union(*(_attributes(each, ops) for each in inner)))
