"""Copies of small CPU tensors on the device that nobody waits for."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor


def upload(value: Tensor, device: torch.device) -> Tensor:
    """`value` on the device, contiguous. On CUDA the copy is queued from pinned memory: any other is waited for."""
    value = value.contiguous()  # what was expanded cannot be pinned as it is
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def upload_all(inputs: Sequence[Any], positions: Container[int], device: torch.device) -> Sequence[Any]:
    """The inputs, those at `positions` on the device."""
    return (
        [upload(value, device) if i in positions else value for i, value in enumerate(inputs)]
        if positions
        else inputs
    )
