"""The most memory that a model took, where PyTorch counts it anyway: measuring must not slow a step down."""

from __future__ import annotations

from typing import Any

import torch

BY_ALLOCATOR = (
    "by PyTorch's CUDA allocator, since the process began or torch.cuda.reset_peak_memory_stats was called; other "
    "models on the device count too"
)
NOT_COUNTED = "PyTorch counts no bytes on this device; python -m bench.memory measures a model on the CPU"


def peak_memory(device: torch.device | None, weight_bytes: int) -> dict[str, Any]:
    """The report's fields `peak_bytes` and `peak_measured`, for a model with so many bytes of weights."""
    if device is None:
        return {}
    if device.type != "cuda":
        return {"peak_bytes": None, "peak_measured": NOT_COUNTED}
    peak = torch.cuda.max_memory_allocated(device) - weight_bytes
    return {"peak_bytes": max(0, peak), "peak_measured": BY_ALLOCATOR}
