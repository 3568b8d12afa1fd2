"""The C++ compiler as Inductor calls it: for sources of ours, and made ready before Inductor asks.

Inductor asks what the machine's vectors can do, and translates its headers, when it compiles the first kernel of a
process: on a cold start 10 s of the processor, in which Python waits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CDLL

from moeca_compile._torch_private.lookup import Private

_log = logging.getLogger(__name__)

_CPP = Private("torch._inductor.codecache.CppCodeCache", "PyTorch's own ops stand in for the C++ kernels")
_BINDINGS = Private(
    "torch._inductor.codecache.CppPythonBindingsCodeCache", "Inductor finds out what the C++ compiler can by itself"
)
_KERNEL = """#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* out) { *out = 0; }
"""


def compile_cpp(source: str) -> CDLL:
    """The functions of a C++ source, compiled with the compiler and flags that Inductor uses, for this machine.

    Raises whatever the compiler's failure raises, RuntimeError where torch has no such compiler.
    """
    if _CPP.value is None:
        raise RuntimeError("this version of torch does not give its C++ compiler away")
    _wait()
    library = _CPP.value.load(source)
    assert isinstance(library, CDLL)
    return library


@contextmanager
def cpp_compiler_made_ready(wanted: bool, then: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Make the compiler ready in a thread meanwhile, and call `then` in it, once a process.

    Hold Dynamo's lock: while Inductor finds out what the machine can do, nobody else may ask.
    """
    if wanted and _BINDINGS.value is not None:
        _thread(then)
    try:
        yield
    finally:
        _wait()


def cpp_compiler_is_busy() -> bool:
    """Whether another thread makes the compiler ready just now, and `compile_cpp` would wait for it."""
    return any(thread.is_alive() and thread is not threading.current_thread() for thread in _threads)


def _wait() -> None:
    if cpp_compiler_is_busy():
        _threads[0].join()


_threads: list[threading.Thread] = []
"""The thread that makes the compiler ready, once there was one."""


def _thread(then: Callable[[], object]) -> None:
    if not _threads:
        _threads.append(threading.Thread(target=_make_ready, args=(then,), name="moeca_compile C++", daemon=True))
        _threads[0].start()


def _make_ready(then: Callable[[], object]) -> None:
    try:
        _BINDINGS.value.load_pybinding(["float*"], _KERNEL)
        then()
    except Exception:  # Inductor will say so where it needs a compiler
        _log.debug("the C++ compiler could not be made ready", exc_info=True)
