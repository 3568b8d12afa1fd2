"""Numbers that the host reads of tensors which are made of constants: `torch.tensor([height, width])`.

Dynamo breaks the graph at `.item()`, whatever the tensor. Where it has only constants for ancestors, what it holds is
the same in every call of the graph, and known while it is traced. Sizes count as constants, with a guard.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile._torch_private.graphs import tensor_of_number
from moeca_compile._torch_private.lookup import Private
from moeca_compile._torch_private.tracing import traces_for_us

_BREAKS = "the graph breaks where the host reads a tensor that is made of constants"
_TENSOR = Private("torch._dynamo.variables.tensor.TensorVariable", _BREAKS)
_CONSTANT = Private("torch._dynamo.variables.ConstantVariable", _BREAKS)

_READS = frozenset({"item", "__index__", "__int__", "__bool__"})
_TAKE_SIZES = frozenset({"reshape", "view", "expand", "repeat", "narrow", "unflatten", "new_zeros", "new_ones"})
_MADE_BY = frozenset({torch.tensor, torch.arange, torch.zeros, torch.ones, torch.full, torch.stack, torch.cat})
_METHODS = frozenset(
    {"reshape", "view", "flatten", "squeeze", "unsqueeze", "repeat", "expand", "permute", "transpose", "unbind", "to"}
    | {"long", "int", "float", "clone", "contiguous", "detach", "cpu", "sum", "prod", "cumsum", "max", "min", "mul"}
)
_OPERATORS = frozenset(
    {operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod}
)
_LARGEST = 4096  # elements of a tensor that is computed while Dynamo waits


def read_constants() -> None:
    """Have Dynamo, where it traces for a backend of ours, go on at such reads."""
    if _TENSOR.value is None or _CONSTANT.value is None or hasattr(_TENSOR.value.call_method, "_moeca_original"):
        return
    original = _TENSOR.value.call_method

    @functools.wraps(original)
    def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name in _READS and not args and not kwargs:
            value = _number(self)
            if value is not None:
                return _CONSTANT.value.create(value)
        if name in _TAKE_SIZES:
            args = [_with_numbers(each) for each in args]
        return original(self, tx, name, args, kwargs)

    call_method._moeca_original = original  # type: ignore[attr-defined]
    _TENSOR.value.call_method = call_method


def _with_numbers(argument: Any) -> Any:
    """An argument, with numbers in the place of integer tensors that hold one constant."""
    items = getattr(argument, "__dict__", {}).get("items")
    if isinstance(items, list):
        changed = [_with_numbers(each) for each in items]
        same = all(a is b for a, b in zip(changed, items, strict=True))
        return argument if same else argument.clone(items=changed)
    value = _number(argument) if isinstance(argument, _TENSOR.value) else None
    return argument if not isinstance(value, int) else _CONSTANT.value.create(value)


def _number(variable: Any) -> Any:
    """What a tensor of Dynamo's holds; None where that is not one number, or not known."""
    try:
        node = variable.as_proxy().node
        example = node.meta["example_value"]
        if not traces_for_us() or not isinstance(example, Tensor) or example.numel() != 1:
            return None
        made_from = _constants(node)
        return _computed(node, made_from).item() if made_from is not None else None
    except Exception:  # of Dynamo's, or of a tensor's: the graph breaks as it would have
        return None


def _constants(node: fx.Node) -> list[fx.Node] | None:
    """All that a node is made from, in order; None where not all of it is constant and known."""
    found, pending = {node}, [node]
    while pending:
        each = pending.pop()
        if _is_size(each):
            continue
        if not _is_pure(each):
            return None
        new = [other for other in each.all_input_nodes if other not in found]
        found.update(new)
        pending += new
    reached = set(found)
    for each in node.graph.nodes:
        if not reached.isdisjoint(each.all_input_nodes):
            if _writes(each):
                return None
            reached.add(each)
    return [each for each in node.graph.nodes if each in found]


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.SymInt)


def _is_pure(node: fx.Node) -> bool:
    example = node.meta.get("example_value")
    if isinstance(example, Tensor) and not example.numel() <= _LARGEST:
        return False
    if node.op == "call_function":
        known = node.target in _MADE_BY or node.target in _OPERATORS or node.target is tensor_of_number
        return known and "out" not in node.kwargs
    return node.op == "call_method" and node.target in _METHODS


def _writes(node: fx.Node) -> bool:
    """Whether a node may change a tensor in place."""
    if "out" in node.kwargs or node.op not in ("call_function", "call_method"):
        return True
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    schema = getattr(node.target, "_schema", None)
    writes = name.endswith("_") and not name.endswith("__")
    return (
        writes
        or name in ("setitem", "__setitem__")
        or (name.startswith("i") and hasattr(operator, name))
        or (schema is not None and schema.is_mutable)
    )


def _computed(node: fx.Node, made_from: list[fx.Node]) -> Any:
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for each in made_from:
            if _is_size(each):
                values[each] = int(each.meta["example_value"])  # which guards it
                continue
            args, kwargs = fx.map_arg((each.args, each.kwargs), values.__getitem__)
            if each.op == "call_function":
                values[each] = each.target(*args, **kwargs)  # type: ignore[operator]
            else:
                values[each] = getattr(args[0], str(each.target))(*args[1:], **kwargs)
    return values[node]
