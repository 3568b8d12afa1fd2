"""Asynchronous copies of small CPU tensors to the device."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor


def upload(value: Tensor, device: torch.device) -> Tensor:
    """`value` on the device, contiguous. For CUDA it is pinned first: the host waits for copies of other memory."""
    value = value.contiguous()  # expanded tensors cannot be pinned
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def upload_all(inputs: Sequence[Any], positions: Container[int], device: torch.device) -> Sequence[Any]:
    """The inputs, with those at `positions` copied to the device."""
    return (
        [upload(value, device) if i in positions else value for i, value in enumerate(inputs)]
        if positions
        else inputs
    )
