"""What dispatch is made of: which values play which role, and what can be asked about a value.

`Site` is what site.py finds.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass

from moeca_compile.capture.dataflow import CALLS_SELF, OPTIONAL_ARGUMENTS, Flow, Names, Value
from moeca_compile.capture.names import REPEATS, SIZES, VIEWS

IndexOf = Callable[[Value], "Value | None"]
"""The expert ids, if a value is the one that an idiom recognizes them by: the argument of a one_hot, a sort."""

ItemsOf = Callable[[Flow], "dict[int, Item]"]


@dataclass(frozen=True)
class Item:
    """A value that belongs to one expert: element e of an attribute of self.

    source: that attribute, as a value
    gathered: the subscript, where it is the expert ids of many branches and not one expert's number
    grouped: whether the value is the whole attribute, which an op takes apart by itself
    bank: whether the attribute is a module that runs all experts on rows sorted by expert (idioms/bank.py)
    """

    source: Value
    gathered: Value | None = None
    grouped: bool = False
    bank: bool = False


@dataclass(frozen=True)
class Selection:
    """What a turn of the loop over experts takes, where that is made in the turn: x[tokens], weighted by `factor`."""

    tokens: Value
    factor: Value
    loop: ast.For


@dataclass(frozen=True)
class Site:
    """One dispatch.

    result: what the marker op replaces; y: an expert's output, before its weight
    rows: base -> the values that are its rows, for x and each further per-token input
    index, weight: the expert ids and the weights, for all tokens
    items: by id of a value, the experts' own
    whole_rows: whether rows keep their views in the experts' code, where they are of all tokens
    statement: the statement that is replaced, or that holds the expression `result`
    base: what the sum is added to, None where that is zeros
    pairs: whether `index` holds tokens for each expert, and not experts for each token
    selection: of pairs, where they are known in a turn of the loop only
    """

    flow: Flow
    tree: ast.FunctionDef
    result: Value
    product: Value
    y: Value
    rows: dict[Value, list[Value]]
    index: Value
    weight: Value
    items: dict[int, Item]
    whole_rows: bool
    statement: ast.stmt
    base: Value | None = None
    pairs: bool = False
    selection: Selection | None = None


def loop_items(flow: Flow) -> dict[int, Item]:
    """`self.a[e]` with e from a loop, and the elements of `self.a` that a loop goes through."""
    looped = dependents(flow, lambda value: value.kind in ("counter", "element"))
    found: dict[int, Item] = {}
    for value in flow.made:
        if (value.kind == "element" and of_self(value.operands[0])) or (
            value.kind == "index" and of_self(value.operands[0]) and id(value.operands[1]) in looped
        ):
            found[id(value)] = Item(value.operands[0])
    return found


def of_self(value: Value) -> bool:
    """Whether a value is an attribute of self, or of an attribute of self."""
    while value.kind == "attribute":
        value = value.operands[0]
        if value.kind == "self":
            return True
    return False


def dependents(flow: Flow, seed: Callable[[Value], bool], by_size: bool = False) -> set[int]:
    """The ids of all values made from one that `seed` holds for; from its sizes or dtype alone if `by_size`."""
    found: set[int] = set()
    for value in flow.made:
        cut = not by_size and value.name in SIZES and value.kind in ("attribute", "call")
        if seed(value) or (not cut and any(id(operand) in found for operand in value.operands)):
            found.add(id(value))
    return found


def nearest(start: Value, found_in: IndexOf) -> Value | None:
    """What `found_in` finds in the values that `start` is made from, the nearest first."""
    seen, pending = {id(start)}, [start]
    while pending:
        value = pending.pop(0)
        found = found_in(value)
        if found is not None:
            return found
        new = [operand for operand in value.operands if id(operand) not in seen]
        seen.update(map(id, new))
        pending.extend(new)
    return None


def base_of(value: Value) -> Value:
    """`value` without views, conversions and constant subscripts."""
    while (value.kind == "call" and value.name in VIEWS | REPEATS and value.operands) or (
        value.kind == "index" and not has_tensors(value.operands[1])
    ):
        value = value.operands[0]
    return value


def has_tensors(subscript: Value) -> bool:
    """Whether a subscript holds more than constants and modules of Python, e.g. not so in [:, None]."""
    return any(value.kind not in ("constant", "operation", "global", "self") for value in subscript.ancestors())


def stateless(flow: Flow) -> bool:
    """Whether a method changes nothing but its own locals."""
    return all(problem.what in (CALLS_SELF, OPTIONAL_ARGUMENTS) for problem in flow.problems)


def spelled(value: Value, names: Names) -> str | None:
    """A local name that stands for `value`, if there is one."""
    return next((name for name, bound in names.items() if bound is value), None)
