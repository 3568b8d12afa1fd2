"""Which modules of a model may be MoE layers, before anything is run: told by how they are built.

An MoE layer has several modules that are built alike, or packed parameters, or it exchanges rows with other ranks.
Its code may ask the host about tensors, or choose by them. Modules that hold such layers themselves are blocks, and
no experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from moeca_compile._torch_private import ranks_are_joined
from moeca_compile.capture.running.own_code import attributes_read
from moeca_compile.capture.source import functions_of
from moeca_compile.capture.structure import structure

_EXCHANGES = frozenset({"all_to_all_single", "all_to_all_single_autograd"})
_DEPTH = 3  # how far a function that holds the model may be called from the one that is compiled


def may_run(layer: nn.Module) -> bool:
    """Whether a layer may hold experts: several modules that are built alike, packed parameters, or one of many that
    other ranks hold."""
    return bool(_alike(layer)) or _is_packed(layer, 1) or exchanges_rows(layer)


def holds_experts(layer: nn.Module) -> bool:
    """The same of a layer that is no mere product with a matrix, as a router is."""
    return bool(_alike(layer)) or _is_packed(layer, 2) or exchanges_rows(layer)


def exchanges_rows(layer: nn.Module) -> bool:
    """Whether a layer's own code, functions that it calls included, exchanges rows with other ranks."""
    if not ranks_are_joined():
        return False
    pending, met = list(functions_of(type(layer))), set()
    while pending:
        function = pending.pop()
        if function.__code__ in met:
            continue
        met.add(function.__code__)
        names = attributes_read(function.__code__) | set(function.__code__.co_names)
        if not _EXCHANGES.isdisjoint(names):
            return True
        pending += filter(None, (_function(function.__globals__.get(name)) for name in names))
    return False


def _function(value: Any) -> FunctionType | None:
    """What is called where code calls a value; None where it is torch's, or none."""
    if isinstance(value, type) and issubclass(value, torch.autograd.Function):
        value = vars(value).get("forward")
    value = value.__func__ if isinstance(value, staticmethod) else value
    own = isinstance(value, FunctionType) and str(value.__module__).partition(".")[0] != "torch"
    return value if own else None


def _holds_networks(layer: nn.Module) -> bool:
    """The same of a layer whose experts are more than products, by code that is not torch's."""
    wrapped = not type(layer).__module__.startswith("torch.")
    return wrapped and (any(any(True for _ in each.children()) for each in _alike(layer)) or _is_packed(layer, 2))


def _is_packed(layer: nn.Module, dims: int) -> bool:
    """Whether a parameter of the layer's own has more than so many dimensions."""
    return any(each.dim() > dims for each in layer.parameters(recurse=False))


def layers_within(root: nn.Module, routes: Callable[[type], bool], known: Callable[[type], bool]) -> list[nn.Module]:
    """The modules inside a module that may be MoE layers, one of each class.

    Args:
        routes: whether a class has code that may ask the host about tensors, or choose by them. Without any, products
            side by side, as for queries and keys, are no experts.
        known: whether a class has a method that an idiom knows.
    """
    found: dict[int, nn.Module] = {}
    holds: dict[int, bool] = {}
    known_kinds: dict[int, bool] = {}  # by identity: a class may be of a metaclass that cannot be hashed

    def is_known(kind: type) -> bool:
        if id(kind) not in known_kinds:
            known_kinds[id(kind)] = known(kind)
        return known_kinds[id(kind)]

    def visit(module: nn.Module) -> bool:
        """Whether a module is such a layer or holds one."""
        if id(module) not in holds:
            holds[id(module)] = False  # a module may hold itself
            inner = any([visit(child) for child in module.children()])
            own = module is not root and _is_layer(module)
            holds[id(module)] = inner or own or is_known(type(module))
        return holds[id(module)]

    def _is_layer(module: nn.Module) -> bool:
        kind = id(type(module))
        if kind not in found and (_holds_networks(module) or routes(type(module)) or exchanges_rows(module)):
            members = _alike(module)
            blocks = any(_has_inside(member, holds) for member in members)
            if (members or _is_packed(module, 1) or exchanges_rows(module)) and not blocks:
                found[kind] = module
        return kind in found

    visit(root)
    return list(found.values())


def modules_among(values: Iterable[Any]) -> Iterator[nn.Module]:
    """The modules among the variables of a function, in what they hold, and in the functions that it calls."""
    pending, met = [(value, 0) for value in values], set()
    while pending:
        value, depth = pending.pop()
        if isinstance(value, nn.Module):
            if id(value) not in met:
                yield value
        elif id(value) not in met and depth < _DEPTH:
            pending += [(each, depth + 1) for each in _held(value)]
        met.add(id(value))


def _held(value: Any) -> list[Any]:
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        if str(value.__module__).partition(".")[0] == "torch":
            return []
        cells = value.__closure__ or ()
        return [*_contents(cells), *(value.__globals__.get(name) for name in value.__code__.co_names)]
    if isinstance(value, ModuleType) and value.__name__.partition(".")[0] == "torch":
        return []
    if isinstance(value, (dict, list, tuple)):
        return [each for each in (value.values() if isinstance(value, dict) else value) if _is_module(each)]
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and not isinstance(value, type):
        return [each for each in attributes.values() if _is_module(each)]
    return []


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _contents(cells: Iterable[Any]) -> Iterator[Any]:
    for cell in cells:
        try:
            yield cell.cell_contents
        except ValueError:  # nothing yet
            continue


def _has_inside(member: nn.Module, holds: dict[int, bool]) -> bool:
    inner = any(holds.get(id(child), False) for child in member.children())
    return inner or (holds.get(id(member), False) and holds_experts(member))


def _alike(layer: nn.Module) -> list[nn.Module]:
    """The modules directly in a layer, or in its lists, of which there are others that are built the same."""
    groups: dict[Any, list[nn.Module]] = defaultdict(list)
    children = list(layer.children())
    for child in [*children, *(each for held in children for each in _elements(held))]:
        if any(True for _ in child.parameters()):
            groups[structure(child)].append(child)
    return [each for group in groups.values() if len(group) > 1 for each in group]


def _elements(held: nn.Module) -> Iterator[nn.Module]:
    if isinstance(held, (nn.ModuleList, nn.ModuleDict)):
        yield from held.children()
