"""A loop in which each expert chooses its tokens: by a threshold, or as many as a capacity predictor counts.

    for e, expert in enumerate(self.experts):
        k = int((capacity[:, e] > self.limit[e]).sum())                  DiffMoE, paper 004, algorithm 4
        gate, token = scores[:, e].topk(k)                               or: a sort, order[:k, e]
        out[token] += gate[:, None] * expert(x[token])                   or: mask = scores[:, e] > 0.2, x[mask]

Told by its data flow: an expert's rows are picked by a mask or a top-k that is made in the loop. The loop is traced
once more for the choices alone, for all tokens and without the host (turns.py).
"""

from __future__ import annotations

import dis
from types import CodeType

from moeca_compile.capture.dataflow import Flow, follow
from moeca_compile.capture.idioms.base import Idiom
from moeca_compile.capture.idioms.expert_choice import puts_back
from moeca_compile.capture.idioms.pairs import Pairs, recognized_pairs
from moeca_compile.capture.names import PICKS, SELECTS
from moeca_compile.capture.roles import dependents, loop_items
from moeca_compile.capture.source import Method

_FOR, _COMPARE = dis.opmap["FOR_ITER"], dis.opmap["COMPARE_OP"]


def plausible(code: CodeType) -> bool:
    """A loop, a comparison or a top-k, and rows that are put back."""
    ops = set(code.co_code[::2])
    chooses = _COMPARE in ops or not (SELECTS | {"gt", "ge"}).isdisjoint(code.co_names)
    return _FOR in ops and chooses and puts_back(code)


def recognize(method: Method) -> Pairs | None:
    """The dispatch in `method` if its experts choose in a loop, else None."""
    flow = follow(method.tree)
    items = {key: item for key, item in loop_items(flow).items() if not _chooses(flow, key)}
    found = recognized_pairs(method, flow, items)
    return found if found is not None and not found.method.by_ids else None


def _chooses(flow: Flow, item: int) -> bool:
    """Whether tokens are chosen by what looks like an expert's own, as by `self.limit[e]`."""
    made = dependents(flow, lambda value: id(value) == item)
    return any(
        id(operand) in made
        for value in flow.made
        if value.kind == "index" or (value.kind == "call" and value.name in PICKS | SELECTS)
        for operand in (value.operands if value.name in SELECTS else value.operands[1:])
    )


IDIOM = Idiom("expert loop", plausible, recognize)
