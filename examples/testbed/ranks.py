"""Several processes that share the samples of each generation.

torchrun --nproc-per-node 2 examples/digits/sample.py

Each process (rank) samples its rows of the batch. Nothing is exchanged during a generation; pictures are gathered
after it. In a process that torchrun has not started, all rows are its own, and the rest of this file does nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Meet the other ranks, by NCCL on GPUs and by gloo on CPUs. Yields this rank's device."""
    if "WORLD_SIZE" not in os.environ:  # torchrun sets it
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def own_rows(batch: int) -> slice:
    """The rows of a batch that this rank samples: as many as those of the other ranks, or one more."""
    rank, ranks = (dist.get_rank(), count()) if dist.is_initialized() else (0, 1)
    return slice(batch * rank // ranks, batch * (rank + 1) // ranks)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def first_one_first() -> Iterator[None]:
    """Rank 0 does what is inside before the others do, which then find on disk what it compiled."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks in their order, on every rank."""
    if not dist.is_initialized():
        return rows
    found: list[Tensor] = [torch.empty(0)] * count()
    dist.all_gather_object(found, rows.cpu())
    return torch.cat(found).to(rows.device)


def mean(value: float) -> float:
    """The mean over all ranks."""
    return float(_all(value).mean())


def longest(seconds: float) -> float:
    """The most over all ranks."""
    return float(_all(seconds).max())


def _all(value: float) -> Tensor:
    return gathered(torch.tensor([value], dtype=torch.float64))
