"""What a layer holds of its experts: their tensors' paths, and all that has to be equal among layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moeca_compile.capture.numerics import NoExpertsError, UntrustedError
from moeca_compile.capture.structure import Path, alive, structure, tensor_paths, unlike


def count(item: Any) -> int:
    return item.shape[0] if isinstance(item, Tensor) else len(item)


def item_paths(item: Any) -> tuple[Path, ...]:
    if isinstance(item, Tensor):
        return ((),)
    if isinstance(item, nn.ParameterList) and len({structure_of(each) for each in item}) == 1:
        return ((),)
    if isinstance(item, nn.ModuleList) and len(item):
        reason = unlike(item)
        if reason:
            raise UntrustedError(reason)
        return tensor_paths(item[0])
    raise NoExpertsError


def shared_paths(shared: Any, layer: nn.Module) -> tuple[Path, ...]:
    if isinstance(shared, Tensor):
        return ((),)
    if isinstance(shared, nn.Module):
        reason = alive(shared)
        if reason:
            raise UntrustedError(f"what its experts share {reason}")
        return tensor_paths(shared)
    if getattr(shared, "__self__", None) is layer:
        raise UntrustedError("its experts' code calls a method of the layer")
    return ()


def structure_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    return structure(value) if isinstance(value, nn.Module) else repr(type(value))
