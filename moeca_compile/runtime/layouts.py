"""Arguments of a model in one layout, so that a timestep that is expanded needs no compiled steps of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 24
"""Bytes up to which an argument is copied rather than compiled for as it lies: a copy of these takes milliseconds."""


def shape_key(value: Any) -> Any:
    """What compiled steps know of an argument: shape, dtype and device, and the strides of a large one."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, None if _is_small(value) else value.stride()
    return value


def in_one_layout(inputs: Sequence[Any], arguments: Sequence[bool]) -> Sequence[Any]:
    """The inputs, with small arguments of the model contiguous. Its weights stay as they are."""
    if all(_fits(value) for value, argument in zip(inputs, arguments, strict=True) if argument):
        return inputs
    return [
        value.contiguous() if argument and not _fits(value) else value
        for value, argument in zip(inputs, arguments, strict=True)
    ]


def _fits(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.is_contiguous() or not _is_small(value)


def _is_small(value: Tensor) -> bool:
    return value.layout is torch.strided and value.numel() * value.element_size() <= SMALL
