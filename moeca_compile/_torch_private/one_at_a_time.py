"""One compilation at a time, of Dynamo's and of ours that happen while a model runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moeca_compile._torch_private.lookup import Private

_LOCK = Private(
    "torch._dynamo.convert_frame.compile_lock",
    "threads must not make the first calls of models at the same time",
)
_FLAG = Private(
    "torch.compiler._is_compiling_flag",
    "compiled functions that other threads call while a step is traced may raise",
)
_ours = threading.RLock()


@contextmanager
def compiling() -> Iterator[None]:
    """Hold Dynamo's lock, and have `torch.compiler.is_compiling()` say so, as while Dynamo compiles.

    Tracing sets flags of the whole process. Without the lock, two threads that trace leave them set for good. Without
    the flag, a compiled function that another thread calls takes itself for traced, and raises.
    """
    with _LOCK.value or _ours, _flagged():
        yield


@contextmanager
def _flagged() -> Iterator[None]:
    before = _FLAG.value is not None and torch.compiler._is_compiling_flag
    if _FLAG.value is not None:
        torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        if _FLAG.value is not None:
            torch.compiler._is_compiling_flag = before
