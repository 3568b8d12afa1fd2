"""All experts on all tokens, weighted by a gate (T, experts) that is zero but for a token's top-k.

    gates = torch.zeros_like(scores).scatter(1, index, weight)           or: from a one_hot of index
    out = einsum("te,ted->td", gates, stack([expert(x) for expert in self.experts], 1))

Told by its data flow: the outputs are weighted by something that expert ids were scattered into.
"""

from __future__ import annotations

from types import CodeType

from moeca_compile.capture.dataflow import Flow, Value, follow
from moeca_compile.capture.idioms.base import Idiom
from moeca_compile.capture.idioms.inline import Inline, recognized
from moeca_compile.capture.idioms.packed import whole
from moeca_compile.capture.names import SCATTERS
from moeca_compile.capture.roles import Item, loop_items
from moeca_compile.capture.source import Method

_GATES = SCATTERS | {"scatter_add", "scatter_add_"}  # all are given (dim, ids, values)


def plausible(code: CodeType) -> bool:
    """A scatter or a one-hot."""
    return not {*_GATES, "one_hot"}.isdisjoint(code.co_names)


def recognize(method: Method) -> Inline | None:
    """The dispatch in `method` if all experts run on all tokens under a sparse gate, else None."""
    return recognized(method, follow(method.tree), index_of, items_of, dense=True)


def index_of(value: Value) -> Value | None:
    """The expert ids, if `value` is a gate or mask that they were scattered into."""
    if value.kind == "call" and value.name in _GATES and len(value.operands) > 2:
        return value.operands[2]
    return value.operands[0] if value.kind == "call" and value.name == "one_hot" and value.operands else None


def items_of(flow: Flow) -> dict[int, Item]:
    """Experts that a loop or a comprehension goes through, or packed parameters in an einsum."""
    factors = [factor for call in flow.called if call.name == "einsum" for factor in call.operands[1:]]
    return loop_items(flow) | whole(factors)


IDIOM = Idiom("dense", plausible, recognize)
