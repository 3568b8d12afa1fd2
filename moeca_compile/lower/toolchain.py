"""The C++ compiler is made ready while a graph is exported, matched and validated.

Inductor asks what the machine's vectors can do, and translates its headers, when it compiles the first kernel of a
process: on a cold start 10 s of the processor, in which Python waits.
"""

from __future__ import annotations

import logging
import threading
from functools import cache

import torch

from moeca_compile._torch_private import ready_cpp_compiler
from moeca_compile.config import MoecaConfig
from moeca_compile.ops.cpu.library import library

_log = logging.getLogger(__name__)


def begin(config: MoecaConfig, device: torch.device) -> None:
    """Make it ready in a thread, where kernels for a CPU will be compiled. `wait` for it before compiling."""
    if config.lowering == "inductor" and device.type == "cpu":
        _thread()


def wait() -> None:
    """Return once it is ready, where that has begun."""
    if _thread.cache_info().currsize:
        _thread().join()


@cache
def _thread() -> threading.Thread:
    thread = threading.Thread(target=_make_ready, name="moeca_compile toolchain", daemon=True)
    thread.start()
    return thread


def _make_ready() -> None:
    try:
        ready_cpp_compiler()
    except Exception:  # Inductor will say so where it needs a compiler
        _log.debug("the C++ compiler could not be made ready", exc_info=True)
        return
    library("grouped_linear")  # every MoE layer has such products
