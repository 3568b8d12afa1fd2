"""Numbers that are copied from a device while the host goes on."""

from __future__ import annotations

import torch
from torch import Tensor


class LateCopy:
    """A tensor's copy on the host: known at once on a CPU, and on an accelerator when the device gets to it."""

    def __init__(self, value: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        self.copy = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=value.is_cuda)
        self.copy.copy_(value, non_blocking=True)
        if value.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(value.device))

    @property
    def known(self) -> bool:
        return self.event is None or bool(self.event.query())

    def values(self) -> Tensor:
        """All of it. Waits for the device."""
        if self.event is not None:
            self.event.synchronize()
        return self.copy

    def number(self) -> float:
        """The only element. Waits for the device."""
        return float(self.values())


def answers_at_once(device: torch.device) -> bool:
    """Whether the host need not wait for a device's values."""
    return device.type == "cpu"


def recording(device: torch.device) -> bool:
    """Whether the caller is recording a CUDA graph, in which the host can wait for nothing."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
