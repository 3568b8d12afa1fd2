"""Numbers that a layer's Python got from tensors, which say how they compare.

    most = counts.max().item()
    if most > 1000:        # false in all random calls: nothing is known of the layer where it is true

They are int or float, or arrays of NumPy with such numbers, and what is computed from them says it too; int() and
float() make plain numbers of them, but for those of conversions.py.
"""

from __future__ import annotations

import dis
import math
import operator
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType
from typing import Any

import numpy as np

Note = Callable[[bool | None, bool], None]
"""Called with the outcome, and whether it was asked for as a truth; None for a number that becomes a plain one."""
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_OF_BITS = ("and_", "or_", "xor", "lshift", "rshift")
_ROUNDED: tuple[Callable[..., Any], ...] = (round, math.trunc, math.ceil, math.floor)
_DECIDING = ("COMPARE_OP", "UNARY_NOT", "TO_BOOL")
_OF_ARRAYS = ("item", "tolist", "max", "min", "sum", "prod", "mean", "any", "all", "argmax", "argmin", "__getitem__")


class _Int(int):
    note: Note

    def item(self) -> Any:
        return self


class _Float(float):
    note: Note

    def item(self) -> Any:
        return self


class _Array(np.ndarray):
    note: Note | None = None

    def __array_finalize__(self, made_from: Any) -> None:
        self.note = getattr(made_from, "note", None)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def __bool__(self) -> bool:
        found = bool(np.asarray(self))
        if self.note is not None:
            self.note(found, True)
        return found


def noting(value: Any, note: Note) -> Any:
    """The same value, list or array of values, whose numbers note the outcome of each comparison."""
    if isinstance(value, list):
        return [noting(each, note) for each in value]
    if isinstance(value, np.ndarray):
        array = value.view(_Array)
        array.note = note
        return array
    if type(value) is not int and type(value) is not float:
        return value
    made: Any = _Int(value) if type(value) is int else _Float(value)
    made.note = note
    return made


@cache
def calls(code: CodeType, at: int) -> bool:
    """Whether the instruction calls something."""
    return any(each.offset == at and "CALL" in each.opname for each in dis.get_instructions(code))


def is_noting(value: Any) -> bool:
    return isinstance(value, (_Int, _Float))


@cache
def decides(code: CodeType, at: int, truth: bool) -> bool:
    """Whether the instruction compares or branches, unless to assert: a sort compares too, and decides nothing.

    truth: whether it asks for a truth, as bool() and any() do
    """
    found = list(dis.get_instructions(code))
    place = next(number for number, each in enumerate(found) if each.offset == at)
    name = found[place].opname
    asserts = any(each.opname == "LOAD_ASSERTION_ERROR" for each in found[place : place + 3])
    return (name in _DECIDING or "JUMP" in name or (truth and "CALL" in name)) and not asserts


def plain(value: Any) -> Any:
    """A number that notes nothing."""
    if isinstance(value, _Int):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, _Float) else value


def _compared(op: Callable[..., bool]) -> Any:
    def compare(self: Any, other: Any) -> bool:
        outcome = op(plain(self), plain(other))
        self.note(bool(outcome), False)
        return outcome

    return compare


def _computed(op: Callable[..., Any]) -> Any:
    return lambda self, *others: noting(op(plain(self), *map(plain, others)), self.note)


def _computed_by_another(op: Callable[..., Any]) -> Any:
    return lambda self, other: noting(op(plain(other), plain(self)), self.note)


def _is_true(self: Any) -> bool:
    self.note(plain(self) != 0, True)
    return bool(plain(self) != 0)


def _copied(self: Any, memo: Any) -> Any:
    """One that a layer has kept is a plain one in a copy of it."""
    return plain(self)


def _lost(kind: Any) -> Any:
    def convert(self: Any) -> Any:
        self.note(None, False)
        return kind(plain(self))

    return convert


def _of_array(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = getattr(np.ndarray, name)(self, *args, **kwargs)
        if self.note is None:
            return found
        if isinstance(found, (np.ndarray, np.generic)) and found.ndim == 0:
            found = np.asarray(found).item()
        return noting(int(found) if isinstance(found, bool) else found, self.note)

    return method


for _name in _OF_ARRAYS:
    setattr(_Array, _name, _of_array(_name))
for _kind, _base in ((_Int, int), (_Float, float)):
    for _name in _COMPARISONS:
        setattr(_kind, f"__{_name}__", _compared(getattr(operator, _name)))
    for _name in (*_ARITHMETIC, *(_OF_BITS if _kind is _Int else ())):
        setattr(_kind, f"__{_name.strip('_')}__", _computed(getattr(operator, _name)))
        setattr(_kind, f"__r{_name.strip('_')}__", _computed_by_another(getattr(operator, _name)))
    for _name in ("neg", "abs"):
        setattr(_kind, f"__{_name}__", _computed(getattr(operator, _name)))
    for _rounded in _ROUNDED:
        setattr(_kind, f"__{_rounded.__name__}__", _computed(_rounded))
    for _name, _method in (
        ("__bool__", _is_true),
        ("__int__", _lost(int)),
        ("__float__", _lost(float)),
        ("__hash__", _base.__hash__),
        ("__deepcopy__", _copied),
    ):
        setattr(_kind, _name, _method)
