"""Kernels of torch that have no public name, and which kernels an op has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeca_compile._torch_private.lookup import Private

_ONE_BY_ONE = "tensors are copied and cleared one by one, a launch each"
_COPY = Private("torch._foreach_copy_", _ONE_BY_ONE)
_ZERO = Private("torch._foreach_zero_", _ONE_BY_ONE)
_KEYS = Private("torch._C.DispatchKey", "steps are not recorded as CUDA graphs")
_ONEDNN = Private(
    "torch.ops.mkldnn._linear_pointwise.default", "float32 linear layers on CPU go to MKL, slower where rows are few"
)
_ONEDNN_ARGUMENTS = ["X", "W", "B", "attr", "scalars", "algorithm"]


def has_kernel_for(op: Any, device: torch.device) -> bool:
    """Whether an implementation of a custom op was registered for this type of device itself."""
    key = getattr(_KEYS.value, {"cpu": "CPU", "cuda": "CUDA"}.get(device.type, ""), None)
    asked = getattr(op, "has_kernel_for_dispatch_key", None)
    return key is not None and asked is not None and bool(asked(key))


def schema_of(op: Any) -> Any:
    """The schema of an op: its arguments, and which of them it writes to. None for what is no op."""
    return getattr(op, "_schema", None)


def float32_matmul_precision() -> str:
    """torch.get_float32_matmul_precision(), which raises once the newer setting of the same was used."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def copy_all(destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its destination, on an accelerator those that are alike with few kernels."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for into, source in zip(destinations, sources, strict=True):
        alike = into.dtype, source.dtype, into.stride() == source.stride()
        group = groups.setdefault(alike, ([], []))
        group[0].append(into)
        group[1].append(source)
    copy = _COPY.value or _copy_one_by_one
    for intos, froms in groups.values():
        copy(intos, froms, non_blocking=True)


def _copy_one_by_one(destinations: Sequence[Tensor], sources: Sequence[Tensor], non_blocking: bool) -> None:
    for into, source in zip(destinations, sources, strict=True):
        into.copy_(source, non_blocking=non_blocking)


def zero_all(tensors: Sequence[Tensor]) -> None:
    """Fill all tensors with 0, on an accelerator with few kernels."""
    if _ZERO.value is not None:
        _ZERO.value(list(tensors))
        return
    for tensor in tensors:
        tensor.zero_()


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch.nn.functional.linear of float32 on CPU by oneDNN."""
    result: Tensor = _ONEDNN.value(x, weight, bias, "none", [], "")
    return result


def find_onednn_linear() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """`_onednn_linear` where torch has oneDNN and its op takes what we give it."""
    if not torch.backends.mkldnn.is_available() or _ONEDNN.value is None:
        return None
    taken = [argument.name for argument in schema_of(_ONEDNN.value).arguments]
    return _onednn_linear if taken == _ONEDNN_ARGUMENTS else None


onednn_linear = find_onednn_linear()
