"""How much memory is free on a device."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process could still allocate; None where nobody says.

    On CUDA, what the device has free and what PyTorch's allocator holds without using it. Else what Linux calls
    available, within the limit of the container.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():  # a model on fake tensors
            return None
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    known = [free for free in (_available(), _left_in_container()) if free is not None]
    return min(known, default=None)


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_container() -> int | None:
    """What a limit of control groups (version 2) leaves; None without one. Cached files count as free."""
    try:
        most, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cached = sum(int(number) for name, number in lines if name in ("inactive_file", "slab_reclaimable"))
        return max(0, most - max(0, used - cached))
    except (OSError, ValueError):  # no such file, or no limit: "max"
        return None
