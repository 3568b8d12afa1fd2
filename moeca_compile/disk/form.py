"""Graphs as plain values and back: numbers, text and lists alone, so that a file of them can do nothing by itself.

    add = torch.ops.aten.add.Tensor(x, 2)   <->   ["add", "aten.add.Tensor", [{"node": 0}, 2], {}, {"tensor": ...}]

A form says all that a graph computes, so equal forms are equal computations: a hash of one is a key.
"""

from __future__ import annotations

import base64
import builtins
import dataclasses
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from moeca_compile._torch_private import fake_mode_of, is_fake

Form = Any
"""None, a bool, a number, text, a list or a dict by text of these."""

_NAMESPACES = ("aten", "prim", "prims", "mkldnn", "moeca")
"""Ops of which torch's version and our sources say what they do. What others do may change unseen."""
_LARGEST = 1 << 20
"""Bytes of a constant that a form may hold."""
_NAMED = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}
_OP, _PACKET = type(torch.ops.aten.relu.default), type(torch.ops.aten.relu)


class NoFormError(ValueError):
    """A value that has no form, or a form that has no value."""


def form_of(value: Any, number: Mapping[fx.Node, int] | None = None) -> Form:
    """The form of a value that may hold nodes, which `number` numbers. Raises NoFormError."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, fx.Node):
        return {"node": (number or {})[value]}
    if isinstance(value, list):
        return [form_of(each, number) for each in value]
    if isinstance(value, tuple):
        return {"tuple": [form_of(each, number) for each in value]}
    for kind, name in _NAMED.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is Ellipsis:
        return {"ellipsis": None}
    if isinstance(value, slice):
        return {"slice": [form_of(each, number) for each in (value.start, value.stop, value.step)]}
    raise NoFormError(f"{type(value).__name__} has no form")


def value_of(form: Form, nodes: list[fx.Node]) -> Any:
    """The value of a form. Raises NoFormError where it has none."""
    if isinstance(form, list):
        return [value_of(each, nodes) for each in form]
    if not isinstance(form, dict):
        return form
    try:
        ((kind, content),) = form.items()
        return _VALUES[kind](content, nodes)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise NoFormError(f"{str(form)[:60]} is no form") from error


def _named(kind: type) -> Callable[[Any, list[fx.Node]], Any]:
    def value(content: Any, nodes: list[fx.Node]) -> Any:
        found = getattr(torch, content)
        if not isinstance(found, kind):
            raise NoFormError(f"{content} is no {kind.__name__}")
        return found

    return value


_VALUES: dict[str, Callable[[Any, list[fx.Node]], Any]] = {
    "node": lambda content, nodes: nodes[content],
    "tuple": lambda content, nodes: tuple(value_of(each, nodes) for each in content),
    "ellipsis": lambda content, nodes: ...,
    "device": lambda content, nodes: torch.device(content),
    "slice": lambda content, nodes: slice(*(value_of(each, nodes) for each in content)),
} | {name: _named(kind) for kind, name in _NAMED.items()}


# --- tensors -------------------------------------------------------------------------------------------------------


def described(value: Any) -> Form:
    """What compiled code knows of a value: shape, strides, dtype and device of a tensor, and numbers as they are."""
    if isinstance(value, (list, tuple)):
        return [described(each) for each in value]
    if not isinstance(value, Tensor):
        return form_of(value)
    if value.layout is not torch.strided or not (is_fake(value) or type(value) in _PLAIN):
        raise NoFormError(f"{type(value).__name__} is no plain tensor")
    sizes = [*value.shape], [*value.stride()]
    if not all(type(size) is int for many in sizes for size in many):
        raise NoFormError("sizes that vary have no form")
    return {"tensor": [*sizes, form_of(value.dtype), str(value.device), value.is_conj() or value.is_neg()]}


_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def examples_of(forms: Sequence[Form]) -> list[Any]:
    """Fake values like those that `described` described. Raises NoFormError where they cannot be made."""
    with fake_mode_of(()):
        return [_example(form) for form in forms]


def _example(form: Form) -> Any:
    """A value like the one described; tensors are made in the fake mode that is on."""
    if isinstance(form, list):
        return tuple(map(_example, form))
    if not isinstance(form, dict) or "tensor" not in form:
        return value_of(form, [])
    shape, stride, dtype, device, lazy = form["tensor"]
    if lazy:
        raise NoFormError("lazily conjugated or negated tensors are not restored")
    return torch.empty_strided(shape, stride, dtype=value_of(dtype, []), device=device)


def content_of(value: Tensor) -> Form:
    """A small tensor with its values."""
    if is_fake(value) or type(value) not in _PLAIN or value.nbytes > _LARGEST:
        raise NoFormError("the values of this tensor are not kept")
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return [described(value), base64.b64encode(flat.numpy().tobytes()).decode()]


def _tensor_of(form: Form) -> Tensor:
    (shape, stride, dtype, device, _), content = form[0]["tensor"], base64.b64decode(form[1], validate=True)
    kind = value_of(dtype, [])
    flat = torch.frombuffer(bytearray(content), dtype=kind) if content else torch.empty(0, dtype=kind)
    return torch.empty_strided(shape, stride, dtype=kind, device=device).copy_(flat.reshape(shape))


# --- graphs --------------------------------------------------------------------------------------------------------


def graph_form(gm: fx.GraphModule) -> Form:
    """The form of a graph of ops with values on its nodes. Raises NoFormError where it has none.

    Values are numbered: most nodes have one of a few shapes.
    """
    number: dict[fx.Node, int] = {}
    lines, values = [], dict[str, tuple[int, Form]]()
    for node in gm.graph.nodes:
        value = described(node.meta.get("val"))
        place, _ = values.setdefault(repr(value), (len(values), value))
        lines.append([*_line(gm, node, number), _path(node), place])
        number[node] = len(number)
    return [lines, [value for _, value in values.values()]]


def computation(form: Form) -> Form:
    """What of a graph's form says what it computes: not the names of its nodes."""
    lines, values = form
    return [[[op, target if op == "call_function" else "", *more] for op, _, target, *more in lines], values]


def _path(node: fx.Node) -> str:
    """The path of the module that a node was traced from, as `module_path` reads it."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(entry[0]) for entry in reversed(list(stack.values()))), "")


def _line(gm: fx.GraphModule, node: fx.Node, number: Mapping[fx.Node, int]) -> list[Form]:
    if node.op in ("placeholder", "output"):
        return [node.op, node.name, str(node.target), form_of(node.args, number)]
    if node.op == "get_attr" and "." not in str(node.target):
        return [node.op, node.name, str(node.target), content_of(getattr(gm, str(node.target)))]
    if node.op != "call_function":
        raise NoFormError(f"{node.op} has no form")
    kwargs = {name: form_of(arg, number) for name, arg in node.kwargs.items()}
    return [node.op, node.name, _target_form(node.target), [form_of(node.args, number), kwargs]]


def _target_form(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    if not isinstance(target, _OP) or target.namespace not in _NAMESPACES:
        raise NoFormError(f"{target} is no op of torch's or ours")
    return str(target)


def _target_of(form: str) -> Any:
    if form == "getitem":
        return operator.getitem
    namespace, name, overload = form.split(".")
    if namespace not in _NAMESPACES:
        raise NoFormError(f"{form} is no op of torch's or ours")
    target = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    if not isinstance(target, _OP):
        raise NoFormError(f"{form} is no op")
    return target


def graph_of(form: Form) -> fx.GraphModule:
    """The graph of a form. Raises NoFormError where it has none."""
    try:
        return _graph_of(form)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise NoFormError(f"no graph: {error}") from error


def _graph_of(form: Form) -> fx.GraphModule:
    graph, root, nodes = fx.Graph(), torch.nn.Module(), list[fx.Node]()
    lines, values = form
    with fake_mode_of(()):
        examples = [None if value is None else _example(value) for value in values]
    for op, name, target, arguments, path, place in lines:
        args, kwargs = (), dict[str, Any]()
        if op == "call_function":
            args = value_of(arguments[0], nodes)
            kwargs = {key: value_of(each, nodes) for key, each in arguments[1].items()}
            target = _target_of(target)
        elif op == "get_attr":
            root.register_buffer(target, _tensor_of(arguments))
        elif op in ("placeholder", "output"):
            args = value_of(arguments, nodes)
        else:
            raise NoFormError(f"{op} is no op of a graph")
        nodes.append(graph.create_node(op, target, args, kwargs, name))
        if examples[place] is not None:
            nodes[-1].meta["val"] = examples[place]
        if path:
            nodes[-1].meta["nn_module_stack"] = {path: (path, "")}
    graph.lint()
    return fx.GraphModule(root, graph)


# --- what Dynamo traced --------------------------------------------------------------------------------------------


def dynamo_form(gm: fx.GraphModule) -> Form:
    """The form of Dynamo's graph, for a key: nothing is made from it again. Raises NoFormError where it has none.

    Its functions must be torch's, Python's or ours, which versions and sources say all about.
    """
    number: dict[fx.Node, int] = {}
    lines = []
    for node in gm.graph.nodes:
        if node.op == "call_function":
            target = _function_form(node.target)
        elif node.op == "get_attr" and "." not in str(node.target):
            target = content_of(getattr(gm, str(node.target)))
        elif node.op in ("placeholder", "call_method", "output"):
            target = str(node.target)
        else:
            raise NoFormError(f"{node.op} has no form")
        kwargs = {name: form_of(arg, number) for name, arg in node.kwargs.items()}
        lines.append([node.op, target, form_of(node.args, number), kwargs, _path(node)])
        number[node] = len(number)
    return lines


_HOLDERS = (torch, torch.nn.functional, torch.Tensor, operator, builtins, math)


def _function_form(target: Any) -> str:
    if isinstance(target, _OP):
        return _target_form(target)
    if isinstance(target, _PACKET) and str(target).partition(".")[0] in _NAMESPACES:
        return str(target)
    name = getattr(target, "__name__", "")
    module = getattr(target, "__module__", None) or ""
    holders = [*_HOLDERS]
    if module.partition(".")[0] in ("torch", "moeca_compile"):
        holders.append(sys.modules.get(module))
    for holder in holders:
        if getattr(holder, name, None) is target:
            return f"{getattr(holder, '__name__', '')}:{name}"
    raise NoFormError(f"{target} may change unseen")


# --- records -------------------------------------------------------------------------------------------------------


def record_form(value: Any, number: Mapping[fx.Node, int]) -> Form:
    """The form of a frozen record, such as the regions of a graph, for a key: nothing is made from it again."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(each.name, getattr(value, each.name)) for each in dataclasses.fields(value)]
        return [type(value).__name__, *([name, record_form(each, number)] for name, each in fields)]
    if isinstance(value, Mapping):
        return [[record_form(key, number), record_form(each, number)] for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return [record_form(each, number) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted((record_form(each, number) for each in value), key=repr)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, sympy.Basic):
        return str(value)
    return form_of(value, number)
