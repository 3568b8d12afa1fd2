"""Arguments of a model in one layout, so that a timestep that is expanded needs no compiled steps of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 24
"""Bytes up to which an argument is copied rather than compiled for as it lies: a copy of these takes milliseconds."""


def shape_key(value: Any) -> Any:
    """What compiled steps know of an argument: shape, dtype and device, and the strides of a large odd one."""
    if isinstance(value, Tensor):
        strides = None if value.is_contiguous() or _is_small(value) else value.stride()
        return value.shape, value.dtype, value.device, strides
    return value


def in_one_layout(inputs: Sequence[Any], tensors: Sequence[int]) -> Sequence[Any]:
    """The inputs, with those at the positions `tensors` contiguous if they are small."""
    odd = []
    for i in tensors:  # at every call
        if not inputs[i].is_contiguous():
            odd.append(i)
    if not odd:
        return inputs
    return [value.contiguous() if i in odd and _is_small(value) else value for i, value in enumerate(inputs)]


def _is_small(value: Tensor) -> bool:
    return value.layout is torch.strided and value.numel() * value.element_size() <= SMALL
