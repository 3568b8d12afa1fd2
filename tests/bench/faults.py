"""Jobs with the faults that the tests of bench.gpu plant. They are pickled by their names, so these are a module."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator

import torch

from bench.gpu_sections.common import Bench, Row


def fine(bench: Bench) -> Iterator[None]:
    """Says when it was ready, and from when to when it was measured."""
    bench.emit(Row("speed", "ready", time.time(), "s"))
    yield
    start = time.time()
    time.sleep(0.2)
    bench.emit(Row("speed", "measured", start, "s"))
    bench.emit(Row("speed", "ended", time.time(), "s"))


def raises(bench: Bench) -> Iterator[None]:
    yield
    raise RuntimeError("no luck [today]")


def dies(bench: Bench) -> Iterator[None]:
    bench.emit(Row("speed", "before its death", 1.0, "ms"))
    yield
    os.kill(os.getpid(), 9)


def hangs_while_compiling(bench: Bench) -> Iterator[None]:
    time.sleep(600)
    yield


def hangs_while_measured(bench: Bench) -> Iterator[None]:
    yield
    time.sleep(600)


def finds_no_memory_beside_others(bench: Bench) -> Iterator[None]:
    """The first process finds none, the second one does."""
    flag = os.environ["MEMORY_FLAG"]
    if not os.path.exists(flag):
        open(flag, "w").close()
        raise torch.OutOfMemoryError("CUDA out of memory")
    yield
    bench.emit(Row("speed", "alone", 1.0, "ms"))


def finds_no_memory(bench: Bench) -> Iterator[None]:
    raise torch.OutOfMemoryError("CUDA out of memory")
    yield


def warns(bench: Bench) -> Iterator[None]:
    yield
    warnings.warn("moeca: refresh_fixed_k runs without kernels (it is Sunday)", stacklevel=1)
    warnings.warn("something else", stacklevel=1)
