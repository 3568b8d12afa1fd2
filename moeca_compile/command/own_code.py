"""Copies of a model that can be compiled in several ways side by side in one process."""

from __future__ import annotations

import copy
from types import FunctionType

from torch import nn


def with_own_code(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters of `model`, and no code.

    Dynamo keeps what it compiles, and which functions it gave up, by their code. Plain torch.compile gives up the
    functions around a loop over experts, for every other backend and copy. So each module of the copy has a class of
    its own, with methods of its own. Functions outside of classes, and torch's modules, stay shared.

    Raises whatever `copy.deepcopy` raises for a model that cannot be copied.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    copied = copy.deepcopy(model, shared)
    classes: dict[type, type] = {}
    for module in copied.modules():
        kind = type(module)
        if not _is_torchs(kind):
            module.__class__ = classes.setdefault(kind, _class_with_own_code(kind))
    return copied


def _is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "builtins")


def _class_with_own_code(kind: type) -> type:
    methods = {
        name: _with_own_code(value)
        for base in reversed(kind.__mro__)
        if not _is_torchs(base)
        for name, value in vars(base).items()
        if isinstance(value, FunctionType)
    }
    about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind,), {**methods, **about})


def _with_own_code(function: FunctionType) -> FunctionType:
    code, defaults = function.__code__.replace(), function.__defaults__
    own = FunctionType(code, function.__globals__, function.__name__, defaults, function.__closure__)
    own.__kwdefaults__, own.__qualname__ = function.__kwdefaults__, function.__qualname__
    own.__dict__.update(function.__dict__)
    return own
