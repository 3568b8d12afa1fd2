"""Copies of small CPU tensors on the device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(value: Tensor, device: torch.device) -> Tensor:
    """`value` on the device. On CUDA the copy is queued from pinned memory; any other makes the host wait."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)
