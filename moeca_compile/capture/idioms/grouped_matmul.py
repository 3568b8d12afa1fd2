"""Packed experts in one grouped matmul: rows sorted by expert, and where each expert's rows end.

    order = index.view(-1).argsort()
    offsets = bincount(index.view(-1)).cumsum(0)
    h = torch._grouped_mm(x[order // k], self.w1, offs=offsets)      or: torch.nn.functional.grouped_mm
    y = torch._grouped_mm(act(h), self.w2, offs=offsets)

Told by its data flow: the second factor of a grouped matmul is a parameter (experts, ..) of self. In the body
of one expert it is a plain product with that expert's matrix (inline.py).
"""

from __future__ import annotations

from types import CodeType

from moeca_compile.capture.dataflow import Flow, follow
from moeca_compile.capture.idioms.base import Idiom
from moeca_compile.capture.idioms.inline import Inline, recognized
from moeca_compile.capture.idioms.packed import looked_up, whole
from moeca_compile.capture.idioms.sorted_segments import index_of
from moeca_compile.capture.roles import Item
from moeca_compile.capture.source import Method

GROUPED = ("grouped_mm", "_grouped_mm")


def plausible(code: CodeType) -> bool:
    return not set(GROUPED).isdisjoint(code.co_names)


def recognize(method: Method) -> Inline | None:
    """The dispatch in `method` if it is by grouped matmuls, else None."""
    return recognized(method, follow(method.tree), index_of, items_of)


def items_of(flow: Flow) -> dict[int, Item]:
    """The packed parameters that grouped matmuls take apart, and biases looked up by the sorted expert ids."""
    factors = [call.operands[1] for call in flow.called if call.name in GROUPED and len(call.operands) > 1]
    found = whole(factors)
    return (found | looked_up(flow)) if found else {}


IDIOM = Idiom("grouped matmul", plausible, recognize)
