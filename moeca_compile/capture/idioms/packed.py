"""What idioms ask about packed experts: one parameter of self (experts, ...) for each matrix."""

from __future__ import annotations

from collections.abc import Iterable

from moeca_compile.capture.dataflow import Flow, Value
from moeca_compile.capture.names import TURNS, VIEWS
from moeca_compile.capture.roles import Item, dependents, has_tensors, of_self


def looked_up(flow: Flow) -> dict[int, Item]:
    """`self.w[ids]`: the parameters of many branches' experts, by a tensor of expert ids."""
    looped = dependents(flow, lambda value: value.kind in ("counter", "element"))
    return {
        id(value): Item(value.operands[0], gathered=value.operands[1])
        for value in flow.made
        if value.kind == "index"
        and of_self(value.operands[0])
        and has_tensors(value.operands[1])
        and id(value.operands[1]) not in looped
    }


def whole(factors: Iterable[Value]) -> dict[int, Item]:
    """`self.w`, or a view of it, as a factor that some op takes apart by expert."""
    found: dict[int, Item] = {}
    for factor in factors:
        while factor.kind == "call" and factor.name in VIEWS | TURNS and factor.operands:
            factor = factor.operands[0]
        if of_self(factor):
            found[id(factor)] = Item(factor, grouped=True)
    return found
