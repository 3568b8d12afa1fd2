"""Dispatch over sorted segments: sort the branches by expert, run each on its slice, add the rows back.

    order = flat_index.argsort()
    ends = flat_index.bincount().cpu().numpy().cumsum(0)
    rows = order // k
    for e, end in enumerate(ends):
        start = 0 if e == 0 else ends[e - 1]
        y = self.experts[e](x[rows[start:end]]) * flat_weight[order[start:end]]
        out.index_add_(0, rows[start:end], y)

Told by its data flow: what is returned was accumulated, starting from zeros, from outputs of a list of
modules of self, each multiplied by entries of one argument (the weights) and run on rows of another (x), both
picked by the sort of a third (the expert ids), whose bincount went to the host.

Where router and dispatch stand together, or experts take further rows, or their outputs are joined and put back
in order before they are weighted, the method is kept around the dispatch (inline.py).
"""

from __future__ import annotations

from types import CodeType

from moeca_compile.capture.dataflow import Flow, Value, follow
from moeca_compile.capture.idioms import routed
from moeca_compile.capture.idioms.base import Idiom
from moeca_compile.capture.idioms.inline import Inline, recognized
from moeca_compile.capture.names import HOST_READS, SCATTER_ADDS, SORTS, VIEWS, ZEROS
from moeca_compile.capture.source import Method


def plausible(code: CodeType) -> bool:
    """A sort, and something that is read by the host."""
    return not SORTS.isdisjoint(code.co_names) and not HOST_READS.isdisjoint(code.co_names)


def recognize(method: Method) -> routed.Routed | Inline | None:
    """The dispatch in `method` if it goes over sorted segments, else None."""
    flow = follow(method.tree)
    routed_alone = _routed(flow)
    if routed_alone is not None or not any(call.name in HOST_READS for call in flow.called):
        return routed_alone
    return recognized(method, flow, index_of)


def index_of(value: Value) -> Value | None:
    """The expert ids, if `value` is their sort."""
    return value.operands[0] if value.kind == "call" and value.name in SORTS and value.operands else None


def _routed(flow: Flow) -> routed.Routed | None:
    """The roles in a method that is handed rows, expert ids and weights and does nothing but dispatch."""
    if flow.unsupported or len(flow.returned) != 1 or len(flow.parameters) != 3:
        return None
    result = flow.returned[0]
    added = _accumulated(result)
    call = routed.expert_call(result)
    order = _order(result)
    if added is None or call is None or order is None or not added.needs(call):
        return None
    index = _parameter(order.operands[0])
    x = _gathered(routed.rows_of(call), order)
    weight = _weight(added, call, order)
    if not index or not _counted_on_host(result, index) or len({x, index, weight, None}) != 4:
        return None
    assert x and weight  # by the set above; for the type checker
    return routed.Routed(routed.list_of(call), flow.parameters, x, index, weight)


def _accumulated(result: Value) -> Value | None:
    """The scatter that built the returned value, if it started from zeros."""
    value = _without_views(result)
    base = _without_views(value.operands[0]) if value.operands else value
    from_zeros = base.kind == "call" and base.name in ZEROS
    return value if value.kind == "call" and value.name in SCATTER_ADDS and from_zeros else None


def _order(result: Value) -> Value | None:
    sorts = result.calls(*SORTS)
    return sorts[0] if len(sorts) == 1 and sorts[0].operands else None


def _counted_on_host(result: Value, index: str) -> bool:
    """Whether the number of branches of each expert was counted and read by the host."""
    counts = [call for call in result.calls("bincount") if _parameter(call.operands[0]) == index]
    return any(host.needs(count) for host in result.calls(*HOST_READS) for count in counts)


def _weight(added: Value, call: Value, order: Value) -> str | None:
    """The parameter whose entries, picked by the order, multiply the expert's output."""
    for product in added.ancestors():
        if product.name in ("Mult", "mul", "mul_", "multiply") and len(product.operands) == 2:
            for output, factor in (product.operands, product.operands[::-1]):
                if output.needs(call) and not factor.needs(call):
                    return _gathered(_without_views(factor), order)
    return None


def _gathered(value: Value, order: Value) -> str | None:
    """The parameter of which `value` is rows picked by the order, through any number of slices, or None."""
    by_order = False
    while True:
        value = _without_views(value)
        if value.kind == "index" or (value.kind == "call" and value.name == "index_select"):
            by_order = by_order or any(subscript.needs(order) for subscript in value.operands[1:])
            value = value.operands[0]
        else:
            return value.name if value.kind == "parameter" and by_order else None


def _parameter(value: Value) -> str | None:
    value = _without_views(value)
    return value.name if value.kind == "parameter" else None


def _without_views(value: Value) -> Value:
    while value.kind == "call" and value.name in VIEWS and value.operands:
        value = value.operands[0]
    return value


IDIOM = Idiom("sorted segments", plausible, recognize)
