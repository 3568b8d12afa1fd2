"""Expert choice: each expert takes the tokens that score best with it (EC-DiT; paper 004, algorithm 1).

    weight, ids = scores.transpose(1, 2).topk(capacity, dim=-1)                  (samples, experts, capacity)
    rows = x.gather(1, ids)                         or: x[ids], einsum("becs,bsd->becd", one_hot(ids), x)
    y = stack([expert(rows[:, e]) for e, expert in enumerate(self.experts)], 1)
    out.scatter_add_(1, ids, weight * y)            or: index_add_, an einsum with the one-hot form again

Told by its data flow: rows of x are picked by what a top-k or a sort chose, and go to experts: of a list, packed in
one parameter, or of a module that is handed all rows sorted by expert (bank.py).
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType

from moeca_compile.capture.dataflow import Flow, Value, follow
from moeca_compile.capture.idioms.base import Idiom
from moeca_compile.capture.idioms.packed import whole
from moeca_compile.capture.idioms.pairs import Pairs, recognized_pairs
from moeca_compile.capture.names import CONTRACTIONS, PICKS, PUTS_BACK, SELECTS, TURNS, VIEWS
from moeca_compile.capture.pair_site import chooses, chosen_tokens
from moeca_compile.capture.roles import Item, dependents, has_tensors, loop_items, of_self
from moeca_compile.capture.source import Method

_STORE = dis.opmap["STORE_SUBSCR"]


def plausible(code: CodeType) -> bool:
    """Rows that are put back, and a top-k or a sort where that may be anything."""
    return not PUTS_BACK.isdisjoint(code.co_names) or (not SELECTS.isdisjoint(code.co_names) and puts_back(code))


def puts_back(code: CodeType) -> bool:
    """Whether rows may be put back to their tokens."""
    return not (PUTS_BACK | {"one_hot"}).isdisjoint(code.co_names) or _STORE in code.co_code[::2]


def recognize(method: Method) -> Pairs | None:
    """The dispatch in `method` if experts take tokens, else None."""
    flow = follow(method.tree)
    found = recognized_pairs(method, flow, items_of(flow))
    return found if found is not None and found.method.by_ids else None


def items_of(flow: Flow) -> dict[int, Item]:
    """Experts of a loop, packed parameters that meet chosen rows, modules that are handed chosen rows."""
    chosen = dependents(flow, chooses)
    factors = [
        factor
        for value in flow.made
        if value.name in CONTRACTIONS and any(id(operand) in chosen for operand in value.operands)
        for factor in value.operands
    ]
    packed = whole(factors)
    biases = whole(_biases(flow, chosen)) if packed else {}
    banks = {id(call.operands[0]): Item(call.operands[0], bank=True) for call in flow.called if _is_bank(call)}
    return loop_items(flow) | packed | biases | banks


def _biases(flow: Flow, chosen: set[int]) -> Iterator[Value]:
    """`self.bias[:, None]` where it is added to what chosen rows became."""
    for value in flow.made:
        if value.name in ("Add", "add") and any(id(operand) in chosen for operand in value.operands):
            for operand in value.operands:
                shaped = operand.kind == "index" and not has_tensors(operand.operands[1])
                if (shaped or operand.name == "unsqueeze") and of_self(operand.operands[0]):
                    yield operand.operands[0]


def _is_bank(call: Value) -> bool:
    """Whether a module of self is handed chosen rows, and something that tells whose they are."""
    if not call.operands or not of_self(call.operands[0]) or len(call.operands) < 3:
        return False
    return any(_is_chosen(rows) for rows in call.operands[1:])


def _is_chosen(rows: Value) -> bool:
    while rows.kind == "call" and rows.name in VIEWS | TURNS and rows.operands:
        rows = rows.operands[0]
    picks = rows.kind == "index" or (rows.kind == "call" and rows.name in PICKS)
    return picks and any(chosen_tokens(subscript) for subscript in rows.operands[1:])


IDIOM = Idiom("expert choice", plausible, recognize)
