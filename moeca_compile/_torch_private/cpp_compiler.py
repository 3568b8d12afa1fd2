"""The C++ compiler as Inductor calls it: for sources of ours, and made ready before Inductor asks.

Inductor asks what the machine's vectors can do, and translates its headers, when it compiles the first kernel of a
process: on a cold start 5 to 10 s of the processor, in which Python waits, and on a warm one a second.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from ctypes import CDLL
from typing import Any

from moeca_compile._torch_private.lookup import Private

_log = logging.getLogger(__name__)

_LATER = "Inductor finds out what the C++ compiler can when it compiles the first kernel, and Python waits"
_CPP = Private("torch._inductor.codecache.CppCodeCache", "PyTorch's own ops stand in for the C++ kernels")
_BINDINGS = Private("torch._inductor.codecache.CppPythonBindingsCodeCache", _LATER)
_VECTORS = Private("torch._inductor.cpu_vec_isa.valid_vec_isa_list", _LATER)
_KERNEL = """#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* out) { *out = 0; }
"""


def compile_cpp(source: str) -> CDLL:
    """The functions of a C++ source, compiled with the compiler and flags that Inductor uses, for this machine.

    Raises whatever the compiler's failure raises, RuntimeError where torch has no such compiler.
    """
    if _CPP.value is None:
        raise RuntimeError("this version of torch does not give its C++ compiler away")
    wait_for_cpp_compiler()
    library = _CPP.value.load(source)
    assert isinstance(library, CDLL)
    return library


def make_cpp_compiler_ready(then: Callable[[], object] | None = None) -> None:
    """Make the compiler ready in a thread, once a process, and then call `then` in a thread, once as well.

    Whoever asks Inductor what the machine can do meanwhile waits for the answer. Inductor is imported here and not in
    the thread: two threads that import modules that need each other may each get half of them.
    """
    if _BINDINGS.value is None or _VECTORS.value is None:
        return
    _have_vectors_asked_for_once()
    for number, task in enumerate((_ask, then)):
        if len(_threads) == number and task is not None:
            before = _threads[-1] if _threads else None
            _threads.append(threading.Thread(target=_run, args=(task, before), name="moeca_compile C++", daemon=True))
            _threads[-1].start()


def cpp_compiler_is_busy() -> bool:
    """Whether another thread makes the compiler ready just now, and `compile_cpp` would wait for it."""
    return any(thread.is_alive() and thread is not threading.current_thread() for thread in _threads)


def wait_for_cpp_compiler() -> None:
    """Return when the compiler is ready, and `then` has been called. Does not wait within `then`."""
    if threading.current_thread() not in _threads:
        for thread in _threads:
            thread.join()


_threads: list[threading.Thread] = []
"""The thread that makes the compiler ready, once there was one, and the one that calls `then`."""


class _Asking:
    """The lock under which one thread asks for the machine's vectors."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def begin_anew(self) -> None:
        """In a forked process: the thread that may have held the lock, or compiled, is not there."""
        self.lock = threading.RLock()
        _threads.clear()


_asking = _Asking()
os.register_at_fork(after_in_child=_asking.begin_anew)


def _run(task: Callable[[], object], before: threading.Thread | None) -> None:
    if before is not None:
        before.join()
    try:
        task()
    except Exception:  # Inductor will say so where it needs a compiler
        _log.debug("the C++ compiler could not be made ready", exc_info=True)


def _ask() -> None:
    _BINDINGS.value.load_pybinding(["float*"], _KERNEL)


def _have_vectors_asked_for_once() -> None:
    """Let one thread at a time try the machine's vectors, and only those that are asked for, for whatever backend.

    Inductor changes the flags of each kind while it tries it, so that two threads that ask at once leave wrong ones
    behind, with which the kernels of the process are compiled, and which no later process finds on disk. It tries all
    kinds to take the first: four, with AMX, of 3 s each.
    """
    module: Any = sys.modules[_VECTORS.value.__module__]
    if module.valid_vec_isa_list is not _VECTORS.value:  # is replaced already
        return

    @functools.cache
    def valid_vec_isa_list() -> Any:
        with _asking.lock:
            kinds = _kinds_of_x86(module)
            return _VECTORS.value() if kinds is None else _Tried(kinds)

    module.valid_vec_isa_list = valid_vec_isa_list


def _kinds_of_x86(module: Any) -> list[Any] | None:
    """What the processor has by its own word, the best first; None on others than Linux on x86."""
    kinds, checker = (getattr(module, name, None) for name in ("supported_vec_isa_list", "x86_isa_checker"))
    if sys.platform != "linux" or platform.machine() != "x86_64" or not kinds or checker is None:
        return None
    has = checker()
    return [kind for kind in kinds if all(flag in has for flag in str(kind).split())]


class _Tried(Sequence[Any]):
    """Those kinds of vectors that the compiler can use, found out one after another as they are asked for."""

    def __init__(self, kinds: Sequence[Any]) -> None:
        self._kinds = kinds

    def __iter__(self) -> Iterator[Any]:
        for kind in self._kinds:
            with _asking.lock:
                works = bool(kind)  # which it remembers
            if works:
                yield kind

    def __getitem__(self, index: Any) -> Any:
        return next(iter(self)) if index == 0 and self else [*iter(self)][index]

    def __len__(self) -> int:
        return len([*iter(self)])

    def __bool__(self) -> bool:
        return any(True for _ in self)
