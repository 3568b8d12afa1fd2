"""A bank: a method that is handed rows sorted by expert, and runs every expert on its part of them.

    def forward(self, rows, counts):                              or: with grouped matmuls of self.w
        parts = rows.split(counts.tolist())
        return torch.cat([part @ self.w[e] for e, part in enumerate(parts)])

By itself it is no dispatch, since it does not know of tokens: the rows were sorted by its caller, whose own method
another idiom recognizes (expert_choice.py). When that one traces an expert's body, it calls the bank with an
`ExpertOf` among the arguments, and the bank runs that one expert on all rows. What comes of it is checked with the
caller's numbers.
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import Tensor, nn

from moeca_compile.capture.dataflow import Flow, Value, follow
from moeca_compile.capture.expert_code import rewritten_body
from moeca_compile.capture.idioms.base import Idiom
from moeca_compile.capture.idioms.grouped_matmul import GROUPED, items_of
from moeca_compile.capture.idioms.held import ExpertOf
from moeca_compile.capture.idioms.marking import Shapes
from moeca_compile.capture.idioms.routed import tensor_at
from moeca_compile.capture.names import CONTRACTIONS, VIEWS
from moeca_compile.capture.numerics import UntrustedError
from moeca_compile.capture.roles import Item, Site, loop_items, stateless
from moeca_compile.capture.site import Finder
from moeca_compile.capture.source import Method


@dataclass(frozen=True)
class Bank:
    """One expert of the method as `function(moeca, rows, *items, *shared)`.

    items, shared: attributes of self, the experts' packed tensors and what they share
    parameters: the method's own, in order, without self; `rows` is the one that holds the sorted rows
    """

    function: Callable[..., Any]
    items: tuple[str, ...]
    shared: tuple[str, ...]
    parameters: tuple[str, ...]
    rows: str

    def asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExpertOf | None:
        """Traceable: the expert that a call asks for; None where it is an ordinary call."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, ExpertOf):
                return value
        return None

    def expert(self, asked: ExpertOf, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Traceable: that expert's output for all rows. Raises UntrustedError where experts are not packed."""
        given = dict(zip(self.parameters, args, strict=False))
        given.update(kwargs)
        asked.items = [tensor_at(module, tuple(name.split("."))) for name in self.items]
        if not all([isinstance(item, Tensor) for item in asked.items]):
            raise UntrustedError("the experts of the module that it calls are not packed in parameters")
        asked.own = [item[asked.number] for item in asked.items]
        shared = [tensor_at(module, tuple(name.split("."))) for name in self.shared]
        return self.function(Shapes(), given[self.rows], *asked.own, *shared)


def plausible(code: CodeType) -> bool:
    """A grouped matmul, or a loop and counts that the host reads."""
    names = set(code.co_names)
    segments = not names.isdisjoint(("tolist", "numpy")) and dis.opmap["FOR_ITER"] in code.co_code[::2]
    return segments or not names.isdisjoint(GROUPED)


def recognize(method: Method) -> Bank | None:
    """The bank that `method` is, else None."""
    flow = follow(method.tree)
    grouped = items_of(flow)
    items = grouped or _packed_in_loop(flow)
    if not items or not stateless(flow) or len(flow.returned) != 1:
        return None
    finder = _BankFinder(flow, method.tree, lambda _: None, items, dense=bool(grouped))
    site = finder.site()
    rows = _parameter_under(next(iter(site.rows))) if site else None
    body = rewritten_body(site, method.function) if site and rows else None
    return Bank(*body, flow.parameters, rows) if body and rows else None


def _packed_in_loop(flow: Flow) -> dict[int, Item]:
    """`self.w[e]` that rows are multiplied by, and whatever else is of one expert beside it, such as a bias."""
    items = loop_items(flow)
    factors = [o for v in flow.made if v.name in CONTRACTIONS | {"linear"} for o in v.operands[1:]]
    return items if any(id(factor) in items for factor in factors) else {}


class _BankFinder(Finder):
    """Finds one expert's code between the sorted rows and what the method returns."""

    def site(self) -> Site | None:
        (returned,) = self.flow.returned
        y = self.branch(returned)
        while y.kind == "call" and y.name in VIEWS and self.is_output(y.operands[0]):
            y = self.branch(y.operands[0])
        statement = self.statement_of(y) if self.is_output(y) else None
        if statement is None:
            return None
        self.names = self.flow.before[statement]
        leaves = self.leaves(y)
        if len(leaves) != 1:
            return None
        rows = {leaves[0]: leaves}
        return Site(self.flow, self.tree, y, y, y, rows, y, y, self.items, False, statement)

    def is_rows(self, value: Value, enters_expert: bool) -> bool:
        if not self.dense:
            return super().is_rows(value, enters_expert)
        firsts = (call.operands[0] for call in self.flow.called if call.name in GROUPED)
        return enters_expert and any(value is first for first in firsts)


def _parameter_under(value: Value) -> str | None:
    while value.operands:
        value = value.operands[0]
    return value.name if value.kind == "parameter" else None


IDIOM = Idiom("bank", plausible, recognize)
