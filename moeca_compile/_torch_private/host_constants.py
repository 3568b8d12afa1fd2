"""Numbers that the host reads of tensors which are made of constants: `torch.tensor([height, width])`.

Dynamo breaks the graph at `.item()`, whatever the tensor. Where it has only constants for ancestors, what it holds is
the same in every call of the graph, and known while it is traced. Sizes count as constants, with a guard. So does one
integer argument, such as a mask of texts, with a guard on what is read of it (argument_reads.py).
"""

from __future__ import annotations

import dis
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from moeca_compile._torch_private.argument_reads import is_argument, value_of
from moeca_compile._torch_private.graphs import tensor_of_number
from moeca_compile._torch_private.kernels import schema_of
from moeca_compile._torch_private.lookup import Private
from moeca_compile._torch_private.method_calls import ask_first
from moeca_compile._torch_private.tracing import traces_for_us

_BREAKS = "the graph breaks where the host reads a tensor that is made of constants"
_TENSOR = Private("torch._dynamo.variables.tensor.TensorVariable", _BREAKS)
_CONSTANT = Private("torch._dynamo.variables.ConstantVariable", _BREAKS)
_BUILDER = Private("torch._dynamo.variables.builder.SourcelessBuilder", _BREAKS)
_TRANSLATORS = Private("torch._dynamo.symbolic_convert.InstructionTranslatorBase", _BREAKS)

_CONDITIONS = frozenset({"UNARY_NOT", "TO_BOOL", *(name for name in dis.opmap if "JUMP" in name and "_IF_" in name)})
_READS = frozenset({"item", "__index__", "__int__", "__bool__"})
_TAKE_SIZES = frozenset({"reshape", "view", "expand", "repeat", "narrow", "unflatten", "new_zeros", "new_ones"})
_MADE_BY = frozenset(
    {torch.tensor, torch.arange, torch.zeros, torch.ones, torch.full, torch.stack, torch.cat, torch.sum, torch.any}
    | {torch.all, torch.max, torch.min, torch.cumsum, torch.logical_not, torch.eq, torch.ne}
)
_METHODS = frozenset(
    {"reshape", "view", "flatten", "squeeze", "unsqueeze", "repeat", "expand", "permute", "transpose", "unbind", "to"}
    | {"long", "int", "float", "clone", "contiguous", "detach", "cpu", "sum", "prod", "cumsum", "max", "min", "mul"}
    | {"any", "all", "bool", "amax", "amin", "argmax", "count_nonzero", "logical_not"}
    | {"eq", "ne", "lt", "le", "gt", "ge"}
)
_OPERATORS = frozenset(
    {operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod}
    | {operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne, operator.invert, operator.neg}
    | {operator.and_, operator.or_}
)
_LARGEST = 4096  # elements of a tensor that is computed while Dynamo waits
_MOST_READ = 64  # numbers that are read at once


def read_constants() -> None:
    """Have Dynamo, where it traces for a backend of ours, go on at such reads."""
    if _TENSOR.value is None or _CONSTANT.value is None or not ask_first(_TENSOR.value, _answer):
        return
    for translator in [_TRANSLATORS.value, *_kinds_of(_TRANSLATORS.value)]:
        _read_conditions(translator)


def _answer(original: Callable[..., Any], variable: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    if name in _READS and not args and not kwargs:
        value = _number(variable)
        if value is not None:
            return _CONSTANT.value.create(value)
    if name == "tolist" and not args and not kwargs:
        value = _known(variable)
        if value is not None:
            return _BUILDER.value.create(tx, value)
    if name in _TAKE_SIZES:
        args = [_with_numbers(each) for each in args]
    return original(variable, tx, name, args, kwargs)


def _kinds_of(kind: Any) -> Iterator[Any]:
    for each in type.__subclasses__(kind) if kind is not None else ():
        yield each
        yield from _kinds_of(each)


def _read_conditions(translator: Any) -> None:
    """`if tensor:` is an instruction of its own. Asserts stay what they are."""
    table: Any = getattr(translator, "dispatch_table", None) or [None] * 256
    for name, code in dis.opmap.items():
        if name in _CONDITIONS and table[code] is not None:
            table[code] = _with_condition(table[code])


def _with_condition(original: Any) -> Any:
    @functools.wraps(original)
    def decide(self: Any, instruction: Any) -> Any:
        stack = getattr(self, "stack", None)
        if stack and isinstance(stack[-1], _TENSOR.value):
            value = _number(stack[-1])
            if value is not None:
                stack[-1] = _CONSTANT.value.create(bool(value))
        return original(self, instruction)

    return decide


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
    value = _known(variable, numbers=1)
    while isinstance(value, list):
        (value,) = value
    return value


def _known(variable: Any, numbers: int = _MOST_READ) -> Any:
    """What a tensor of Dynamo's holds, as Python's numbers; None where that is more than so many, or not known."""
    try:
        node = variable.as_proxy().node
        example = node.meta["example_value"]
        if not traces_for_us() or not isinstance(example, Tensor) or not 0 < example.numel() <= numbers:
            return None
        made_from = _constants(node)
        if made_from is None:
            return None
        arguments = [each for each in made_from if each.op == "placeholder" and not _is_size(each)]
        computed = _as_function(node, made_from, arguments)
        if not arguments:
            return computed().tolist()
        return value_of(arguments[0], node, computed) if len(arguments) == 1 else None
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
    memory = {_memory(each) for each in found} - {None}
    for each in node.graph.nodes:
        if _writes(each) and not memory.isdisjoint(map(_memory, each.all_input_nodes)):
            return None
    return [each for each in node.graph.nodes if each in found]


def _memory(node: fx.Node) -> Any:
    example = node.meta.get("example_value")
    return StorageWeakRef(example.untyped_storage()).cdata if isinstance(example, Tensor) else None


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.SymInt)


def _is_pure(node: fx.Node) -> bool:
    example = node.meta.get("example_value")
    if isinstance(example, Tensor) and not example.numel() <= _LARGEST:
        return False
    if is_argument(node):
        return True
    if node.op == "call_function":
        known = node.target in _MADE_BY or node.target in _OPERATORS or node.target is tensor_of_number
        return known and "out" not in node.kwargs
    return node.op == "call_method" and node.target in _METHODS


def _writes(node: fx.Node) -> bool:
    """Whether a node may change a tensor in place."""
    if "out" in node.kwargs or node.op not in ("call_function", "call_method"):
        return True
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    schema = schema_of(node.target)
    writes = name.endswith("_") and not name.endswith("__")
    return (
        writes
        or name in ("setitem", "__setitem__")
        or (name.startswith("i") and hasattr(operator, name))
        or (schema is not None and schema.is_mutable)
    )


def _as_function(node: fx.Node, made_from: list[fx.Node], arguments: list[fx.Node]) -> Callable[..., Any]:
    """A node's value as a function of these arguments, all else being constant."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {each: graph.placeholder(each.name) for each in arguments}
    for each in made_from:
        if _is_size(each):
            values[each] = int(each.meta["example_value"])  # which guards it
        elif each not in values:
            args, kwargs = fx.map_arg((each.args, each.kwargs), values.__getitem__)
            values[each] = graph.create_node(each.op, each.target, args, kwargs)
    graph.output(values[node])
    return torch.no_grad()(fx.GraphModule({}, graph).forward)
