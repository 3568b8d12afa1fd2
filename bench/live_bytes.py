"""Bytes of the tensors that are alive on a device, and the most of them at a time.

    live = LiveBytes(device)     # from here on
    model(x, t, y)
    live.peak                    # the most bytes at a time, beyond those that were there before

On a GPU these are the figures of PyTorch's allocator, on the CPU those of a counting allocator (live_bytes.cpp) that
is compiled at first use. It sees what ATen, Inductor's code and C++ ops allocate, whatever thread they run on.
"""

from __future__ import annotations

import gc
from ctypes import CDLL, RTLD_GLOBAL, c_int64
from functools import cache
from pathlib import Path

import torch

from moeca_compile._torch_private import compile_cpp


class LiveBytes:
    """Counts from when it is made; `restart_peak` begins a new maximum over the same base."""

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.device, self.base = device, _live(device)
        self.restart_peak()

    def restart_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _counter().live_bytes_reset_peak()

    @property
    def now(self) -> int:
        """Bytes alive beyond those at the start."""
        return _live(self.device) - self.base

    @property
    def peak(self) -> int:
        """The most bytes alive at a time, beyond those at the start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.base
        return int(_counter().live_bytes_peak()) - self.base


def _live(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else int(_counter().live_bytes())


@cache
def _counter() -> CDLL:
    CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"), mode=RTLD_GLOBAL)  # the allocator's base class
    library = compile_cpp(Path(__file__).with_suffix(".cpp").read_text())
    library.live_bytes.restype = library.live_bytes_peak.restype = c_int64
    library.live_bytes_install()
    return library
