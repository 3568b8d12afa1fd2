"""int() and float() that keep numbers noting (numbers.py), in the layer's own code while it is watched.

    most = int(counts.max())
    if most > 1000:

They have the names of the built-in ones in the modules of that code, where these names are called and compared with
types, and nothing else: `dtype=int` wants the built-in one.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor

from moeca_compile.capture.running.numbers import Note, is_noting, noting, plain

_KINDS = {"int": int, "float": float}
_CALLED = 1  # of the argument of LOAD_GLOBAL, in Python 3.11 and later


@contextmanager
def converted(functions: Collection[FunctionType], note: Note) -> Iterator[None]:
    """While these functions run, int() and float() in them keep numbers noting."""
    changed: list[tuple[dict[str, Any], str]] = []
    try:
        for scope, names in _names_to_change(functions):
            for name in names:
                scope[name] = _converter(_KINDS[name], note)
                changed.append((scope, name))
        yield
    finally:
        for scope, name in changed:
            scope.pop(name, None)


def _names_to_change(functions: Collection[FunctionType]) -> list[tuple[dict[str, Any], set[str]]]:
    scopes = {id(each.__globals__): each.__globals__ for each in functions}
    names = {number: set(_KINDS) - scope.keys() for number, scope in scopes.items()}
    for each in functions:
        names[id(each.__globals__)] -= _read_otherwise(each.__code__)
    return [(scopes[number], found) for number, found in names.items()]


@cache
def _read_otherwise(code: CodeType) -> frozenset[str]:
    """The names that the code neither calls nor gives to isinstance, or may not."""
    found: set[str] = set()
    before: list[str] = []  # the names that were called last
    for each in dis.get_instructions(code):
        if each.opname == "LOAD_GLOBAL":
            called = sys.version_info < (3, 11) or bool((each.arg or 0) & _CALLED)
            if called:
                before = [*before[-1:], each.argval]
            elif "isinstance" not in before:
                found.add(each.argval)
    return frozenset(found.union(*(_read_otherwise(each) for each in code.co_consts if isinstance(each, CodeType))))


class _Converter(type):
    """The type of what stands for int or float, whose instances are those of the built-in one."""

    kind: Any
    note: Note

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.kind)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        value = args[0].item() if args and isinstance(args[0], Tensor) else args[0] if args else 0
        return noting(cls.kind(plain(value)), cls.note) if is_noting(value) else cls.kind(*args, **kwargs)


def _converter(kind: Any, note: Note) -> Any:
    return _Converter(kind.__name__, (), {"kind": kind, "note": staticmethod(note)})
