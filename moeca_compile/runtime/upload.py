"""Copies of small CPU tensors on the device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(value: Tensor, device: torch.device) -> Tensor:
    """`value` on the device, contiguous. On CUDA the copy is queued from pinned memory: any other is waited for."""
    value = value.contiguous()  # what was expanded cannot be pinned as it is
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)
