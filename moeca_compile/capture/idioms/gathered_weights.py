"""Packed experts looked up for every branch: a batched product with `self.w[index]`.

    h = torch.bmm(x.repeat_interleave(k, 0).unsqueeze(1), self.w1[index.view(-1)])
    h = torch.einsum("td,tkdh->tkh", x, self.w1[index])              or this, with a dimension for k

Told by its data flow: parameters of self are indexed with a tensor. In the body of one expert the looked up
parameter has dimensions of size 1 in place of those of the ids (inline.py).
"""

from __future__ import annotations

import dis
from types import CodeType

from moeca_compile.capture.dataflow import Value, follow
from moeca_compile.capture.idioms.base import Idiom
from moeca_compile.capture.idioms.inline import Inline, recognized
from moeca_compile.capture.idioms.packed import looked_up
from moeca_compile.capture.names import CONTRACTIONS
from moeca_compile.capture.source import Method

# `@` is an instruction of its own in Python 3.10, and from 3.11 on a BINARY_OP with this argument.
_BINARY_OP, _AT = dis.opmap.get("BINARY_OP"), 4
_BINARY = {_BINARY_OP, dis.opmap.get("BINARY_MATRIX_MULTIPLY")} - {None}


def plausible(code: CodeType) -> bool:
    """A product of batches of matrices, by name or as `@`."""
    if not CONTRACTIONS.isdisjoint(code.co_names):
        return True
    return any(
        op in _BINARY and (op != _BINARY_OP or arg == _AT)
        for op, arg in zip(code.co_code[::2], code.co_code[1::2], strict=True)
    )


def recognize(method: Method) -> Inline | None:
    """The dispatch in `method` if it looks up its experts' parameters by their ids, else None."""
    flow = follow(method.tree)
    items = looked_up(flow)

    def index_of(value: Value) -> Value | None:
        item = items.get(id(value))
        return item.gathered if item else None

    return recognized(method, flow, index_of, lambda _: items, dense=True) if items else None


IDIOM = Idiom("gathered weights", plausible, recognize)
