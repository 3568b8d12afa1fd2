"""Dispatch by masks: for each expert, or each one that was hit, the tokens that chose it.

    mask = one_hot(index, num_experts).permute(2, 1, 0)       or: index == e
    for e in mask.sum((-1, -2)).nonzero():                    or: for e, expert in enumerate(self.experts)
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, self.experts[e](x[token]) * weight[token, slot, None])

Told by its data flow: an expert's rows are picked by the one-hot form of the expert ids, or by their comparison
with the number of the loop. The rest of the method, the router too, is kept (inline.py).
"""

from __future__ import annotations

import dis
from types import CodeType

from moeca_compile.capture.dataflow import Value, follow
from moeca_compile.capture.idioms.base import Idiom
from moeca_compile.capture.idioms.inline import Inline, recognized
from moeca_compile.capture.names import PUTS_BACK
from moeca_compile.capture.source import Method

_FOR, _COMPARE, _STORE = (dis.opmap[name] for name in ("FOR_ITER", "COMPARE_OP", "STORE_SUBSCR"))
_WRITES = PUTS_BACK | {"masked_scatter"}  # by the mask itself


def plausible(code: CodeType) -> bool:
    """A loop, a one-hot or a comparison, and rows that are written."""
    ops = set(code.co_code[::2])
    masks = "one_hot" in code.co_names or "eq" in code.co_names or _COMPARE in ops
    return _FOR in ops and masks and (_STORE in ops or not _WRITES.isdisjoint(code.co_names))


def recognize(method: Method) -> Inline | None:
    """The dispatch in `method` if it picks rows by masks, else None."""
    return recognized(method, follow(method.tree), index_of)


def index_of(value: Value) -> Value | None:
    """The expert ids, if `value` is their one-hot form or their comparison with the number of a loop."""
    if value.kind == "call" and value.name == "one_hot" and value.operands:
        return value.operands[0]
    if value.name in ("Eq", "eq") and len(value.operands) == 2:
        for ids, number in (value.operands, value.operands[::-1]):
            if _of_loop(number) and ids.kind != "constant":
                return ids
    return None


def _of_loop(value: Value) -> bool:
    """Whether a value is the number of a loop's turn: of an enumerate, a range, the experts that were hit."""
    while (value.kind == "call" and value.name in ("item", "int", "squeeze")) or value.kind == "index":
        value = value.operands[0]
    return value.kind in ("counter", "element")


IDIOM = Idiom("mask loop", plausible, recognize)
