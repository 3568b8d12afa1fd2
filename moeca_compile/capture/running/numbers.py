"""Numbers that a layer's Python got from tensors, which say how they compare.

    most = counts.max().item()
    if most > 1000:        # false in all random calls: nothing is known of the layer where it is true

They are int or float, and what is computed from them says it too.
"""

from __future__ import annotations

import dis
import operator
from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import Any

Note = Callable[[bool], None]
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_DECIDING = ("COMPARE_OP", "UNARY_NOT", "TO_BOOL")


class _Int(int):
    note: Note


class _Float(float):
    note: Note


def noting(value: Any, note: Note) -> Any:
    """The same value, or list of values, whose numbers note the outcome of each comparison."""
    if isinstance(value, list):
        return [noting(each, note) for each in value]
    if type(value) is not int and type(value) is not float:
        return value
    made: Any = _Int(value) if type(value) is int else _Float(value)
    made.note = note
    return made


@cache
def decides(code: CodeType, at: int) -> bool:
    """Whether the instruction compares or branches, unless to assert: a sort compares too, and decides nothing."""
    found = list(dis.get_instructions(code))
    place = next(number for number, each in enumerate(found) if each.offset == at)
    name = found[place].opname
    asserts = any(each.opname == "LOAD_ASSERTION_ERROR" for each in found[place : place + 3])
    return (name in _DECIDING or "JUMP" in name) and not asserts


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, _Int) else float(value) if isinstance(value, _Float) else value


def _compared(op: Callable[..., bool]) -> Any:
    def compare(self: Any, other: Any) -> bool:
        outcome = op(_plain(self), _plain(other))
        self.note(bool(outcome))
        return outcome

    return compare


def _computed(op: Callable[..., Any]) -> Any:
    return lambda self, *others: noting(op(_plain(self), *map(_plain, others)), self.note)


def _computed_by_another(op: Callable[..., Any]) -> Any:
    return lambda self, other: noting(op(_plain(other), _plain(self)), self.note)


def _is_true(self: Any) -> bool:
    self.note(_plain(self) != 0)
    return bool(_plain(self) != 0)


for _kind, _base in ((_Int, int), (_Float, float)):
    for _name in _COMPARISONS:
        setattr(_kind, f"__{_name}__", _compared(getattr(operator, _name)))
    for _name in _ARITHMETIC:
        setattr(_kind, f"__{_name}__", _computed(getattr(operator, _name)))
        setattr(_kind, f"__r{_name}__", _computed_by_another(getattr(operator, _name)))
    for _name in ("neg", "abs"):
        setattr(_kind, f"__{_name}__", _computed(getattr(operator, _name)))
    for _name, _method in (("__bool__", _is_true), ("__hash__", _base.__hash__)):
        setattr(_kind, _name, _method)
