"""Whether the experts of a layer are the same but for their parameters, as the markers take for granted."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from moeca_compile._torch_private import has_forward_hooks
from moeca_compile.capture.source import codes_of

Path = tuple[str, ...]
"""The way to a parameter from its expert: ("mlp", "0", "weight")."""

OF_ALL_MODULES = frozenset(vars(nn.Module()))
"""The names of what every module holds."""
Structure = tuple[Any, ...]
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, type, BuiltinFunctionType)


def named_tensors(expert: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """An expert's parameters, then its buffers: the order of `params` in the marker op."""
    return chain(expert.named_parameters(), expert.named_buffers())


def tensor_paths(expert: nn.Module) -> tuple[Path, ...]:
    return tuple(tuple(name.split(".")) for name, _ in named_tensors(expert))


def structure(expert: nn.Module) -> Structure:
    """What has to be equal among the experts: modules, their attributes, all of the tensors but values."""
    modules = tuple((name, type(module), _plain_attributes(module)) for name, module in expert.named_modules())
    tensors = tuple(
        (name, tuple(tensor.shape), tensor.dtype, tensor.device) for name, tensor in named_tensors(expert)
    )
    return modules, tensors


def unlike(experts: nn.ModuleList) -> str | None:
    """Why the experts cannot stand for each other; None where they can."""
    first = structure(experts[0])
    for number, expert in enumerate(experts):
        reason = alive(expert)
        if reason:
            return f"expert {number} {reason}"
        if structure(expert) != first:
            return f"expert {number} is built differently from expert 0"
    return None


def alive(expert: nn.Module) -> str | None:
    """Why a module may not stand for another, whatever its structure: it has a life of its own."""
    for module in expert.modules():
        if trains(module):
            return "is in training mode"
        if has_forward_hooks(module):
            return "has forward hooks"
        if any(map(_holds_a_tensor, _own(module))):
            return "holds a tensor that is neither a parameter nor a buffer"
    return None


def _own(module: nn.Module) -> Iterator[Any]:
    """What a module holds beside what every module has, such as its parameters."""
    return (value for name, value in vars(module).items() if name not in OF_ALL_MODULES)


def _holds_a_tensor(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return any(isinstance(each, Tensor) for each in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)


def trains(module: nn.Module) -> bool:
    """Whether it is in training mode, and its class has code that asks whether it is.

    Adapters that are loaded into a model in eval mode (peft's) are in training mode, and never ask.
    """
    if not module.training:
        return False
    return any("training" in _names(code) for _, code in codes_of(type(module), lambda each: each is nn.Module))


def _names(code: CodeType) -> set[str]:
    """The globals and attributes that a function's code names, and the functions within it."""
    within = (_names(each) for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*within)


def _plain_attributes(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Numbers, names, functions; other objects are left to the numerical check."""
    public = ((name, value) for name, value in sorted(vars(module).items()) if not name.startswith("_"))
    comparable = ((name, _code_of(value)) for name, value in public)
    return tuple((name, value) for name, value in comparable if isinstance(value, (*_PLAIN, CodeType)))


def _code_of(value: Any) -> Any:
    """A lambda made in `__init__` is another object in each expert: its code is what counts."""
    return value.__code__ if isinstance(value, FunctionType) else value
