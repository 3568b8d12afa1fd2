"""Methods that look like MoE dispatch but match no idiom: worth a warning once they are met.

Told by their data flow: modules of a list of self are called on rows that were picked by what the data say,
a `nonzero`, a `bincount`, a comparison, for each turn of a loop anew. A loop over a network's blocks calls
them on all rows, or always on the same: no suspect.
"""

from __future__ import annotations

import dis
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from moeca_compile.capture.dataflow import Value, follow
from moeca_compile.capture.source import Method

ADVICE = "docs/capture.md says what it has to be, and docs/extending/idiom.md how to teach a way of writing it"
REASON = "it looks like MoE dispatch, but no idiom matches it"

_DATA_DEPENDENT = frozenset({"bincount", "nonzero", "one_hot", "unique", "argwhere", "where", "histc"})
_COMPARISONS = frozenset({"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE", "eq"})
_PICKS = ("index_select", "masked_select", "gather", "split", "tensor_split")
_FOR = dis.opmap["FOR_ITER"]
_COMPARES = dis.opmap["COMPARE_OP"]
_ASKS = frozenset({"all", "numpy", "masked_select", "grouped_mm", "_grouped_mm"})
_CHOOSES = frozenset({"topk", "argmax"})
_HINTS = _DATA_DEPENDENT | {"any", "sum", "item", "tolist", "argsort", "sort"}


def may_be_suspect(code: CodeType) -> bool:
    """Cheap: whether it is worth reading the source."""
    return not _HINTS.isdisjoint(code.co_names) and _FOR in code.co_code[::2]


def may_route(function: Any) -> bool:
    """Cheap: whether a function's code, or that of functions within it and of its module, may depend on the data or
    choose by them."""
    codes, met = [getattr(function, "__code__", None)], set()
    names = getattr(function, "__globals__", {})
    while codes:
        code = codes.pop()
        if code is None or code in met:
            continue
        met.add(code)
        if not (_HINTS | _ASKS | _CHOOSES).isdisjoint(code.co_names) or {_FOR, _COMPARES} <= set(code.co_code[::2]):
            return True
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        others = (names.get(name) for name in code.co_names)
        codes += [each.__code__ for each in others if isinstance(each, FunctionType)]
    return False


def expert_lists(method: Method) -> tuple[str, ...]:
    """The attributes of self whose modules `method` calls on rows picked by the data; often ()."""
    called = (call for call in follow(method.tree).called if call.name in ("", "forward"))
    found = {_list_of(call.operands[0]): None for call in called if any(map(_is_picked, call.operands[1:]))}
    return tuple(name for name in found if name)


def holds_modules(module: nn.Module, names: tuple[str, ...]) -> bool:
    return any(isinstance(getattr(module, name, None), (nn.ModuleList, nn.ModuleDict)) for name in names)


def _list_of(callee: Value) -> str:
    source = callee.operands[0] if callee.kind in ("index", "element") else callee
    while source.kind in ("call", "operation") and source.operands:  # enumerate(self.experts[a:b]) and the like
        source = source.operands[0]
    return source.name if source.kind == "attribute" and source.operands[0].kind == "self" else ""


def _is_picked(rows: Value) -> bool:
    for value in rows.ancestors():
        picks = value.kind == "index" or (value.kind == "call" and value.name in _PICKS)
        if picks and any(_by_the_data(subscript) for subscript in value.operands[1:]):
            return True
    return False


def _by_the_data(subscript: Value) -> bool:
    """Whether a subscript depends on the data and on a loop's variable, as the rows of one expert do."""
    made_from = list(subscript.ancestors())
    loops = any(value.kind in ("counter", "element") for value in made_from)
    return loops and any(
        (value.kind == "call" and value.name in _DATA_DEPENDENT)
        or (value.kind == "operation" and value.name in _COMPARISONS)
        for value in made_from
    )
