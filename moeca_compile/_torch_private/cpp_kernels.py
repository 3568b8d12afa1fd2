"""The C++ kernels of a graph, compiled as one file.

Inductor calls the C++ compiler once for each kernel, and most of each call goes into reading headers: 21 kernels of a
step (DSMoE-S) took 17.6 s of the processor, and as one file 3.6 s. So while graphs are compiled here, the kernels of
each become one file, and the next graph's code is written while the compiler works on it.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from moeca_compile._torch_private.lookup import Private

_log = logging.getLogger(__name__)

_ONE_BY_ONE = "the C++ compiler is called for each kernel, and a cold start on a CPU takes longer"
_ASYNC = Private("torch._inductor.async_compile.AsyncCompile", _ONE_BY_ONE)
_BINDINGS = Private("torch._inductor.codecache.CppPythonBindingsCodeCache", _ONE_BY_ONE)

_DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*(\w+).*\n?", re.MULTILINE)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include\b.*\n?", re.MULTILINE)
_ENTRY = 'extern "C"'
_INIT = "PyMODINIT_FUNC PyInit_kernel("

_MODULE = """
static struct PyModuleDef joined_kernels = {{PyModuleDef_HEAD_INIT, "kernel", NULL, -1, NULL}};

PyMODINIT_FUNC PyInit_kernel(void) {{
    PyObject* (*const parts[])(void) = {{{parts}}};
    PyObject* joined = PyModule_Create(&joined_kernels);
    if (joined == NULL) return NULL;
#ifdef Py_GIL_DISABLED
    PyUnstable_Module_SetGIL(joined, Py_MOD_GIL_NOT_USED);
#endif
    PyObject* all = PyList_New(0);
    if (all == NULL) return NULL;
    for (auto init : parts) {{
        PyObject* part = init();
        if (part == NULL || PyList_Append(all, part) < 0) return NULL;
        Py_DECREF(part);
    }}
    if (PyObject_SetAttrString(joined, "parts", all) < 0) return NULL;
    Py_DECREF(all);
    return joined;
}}
"""


class _Kernel(NamedTuple):
    """A kernel that waits to be compiled: what Inductor gave, and the same with its Python binding."""

    argtypes: Sequence[str]
    source: str
    text: str


@contextmanager
def joined_kernels() -> Iterator[None]:
    """Compile the C++ kernels of graphs that this thread compiles within as one file a graph.

    They are ready at the end. Hold Dynamo's lock: a class of Inductor's is replaced meanwhile.
    """
    if any(each.value is None for each in (_ASYNC, _BINDINGS)):
        yield
        return
    pending: list[Callable[[], None]] = []
    module = _module_of(_ASYNC.value)
    original = module.AsyncCompile
    module.AsyncCompile = _joining(original, threading.get_ident(), pending)
    try:
        yield
    finally:
        module.AsyncCompile = original
        for finish in pending:
            finish()


def _module_of(kind: Any) -> Any:
    return sys.modules[kind.__module__]


def _joining(original: Any, thread: int, pending: list[Callable[[], None]]) -> type:
    """Inductor's AsyncCompile, one of which compiles the kernels of one graph."""

    class Joining(original):
        def cpp_pybinding(self, argtypes: list[str], source_code: str) -> Any:
            text = _with_binding(argtypes, source_code) if threading.get_ident() == thread else None
            if text is None:
                return super().cpp_pybinding(argtypes, source_code)
            return _Kernel(argtypes, source_code, text)

        def wait(self, scope: dict[str, Any]) -> None:
            kernels = {name: value for name, value in scope.items() if isinstance(value, _Kernel)}
            finish = self._begun(kernels, scope) if len(kernels) > 1 else None
            if finish is None:
                self._one_by_one(kernels, scope)
            else:
                pending.append(finish)
            super().wait(scope)

        def _begun(self, kernels: dict[str, _Kernel], scope: dict[str, Any]) -> Callable[[], None] | None:
            """Have one file compiled. Returns what puts its functions into `scope`; None where that fails."""
            try:
                # With one thread `submit` compiles at once, and would wait for the lock under which it is called.
                submit = None if _module_of(original).get_compile_threads() <= 1 else self.submit
                load = _BINDINGS.value.load_async(joined([k.text for k in kernels.values()]), submit_fn=submit)
            except Exception:
                _log.debug("kernels cannot be compiled as one file", exc_info=True)
                return None

            def finish() -> None:
                try:
                    scope.update(zip(kernels, [part.kernel for part in load().parts], strict=True))
                except Exception:
                    _log.debug("kernels cannot be compiled as one file", exc_info=True)
                    self._one_by_one(kernels, scope)
                    original.wait(self, scope)

            return finish

        def _one_by_one(self, kernels: dict[str, _Kernel], scope: dict[str, Any]) -> None:
            for name, kernel in kernels.items():
                scope[name] = original.cpp_pybinding(self, kernel.argtypes, kernel.source)

    return Joining


def _with_binding(argtypes: Sequence[str], source: str) -> str | None:
    """A kernel with its Python binding, as Inductor would compile it; None where it cannot share a file.

    That is so where it defines macros, or more than one function with C's linkage.
    """
    plain = {match[1] for match in _DIRECTIVE.finditer(source)} <= {"include", "pragma"}
    if not plain or source.count(_ENTRY) != 1:
        return None
    found: list[str] = []

    class Reader(_BINDINGS.value):  # type: ignore[name-defined]
        @classmethod
        def load_async(cls, main_code: str, *args: Any, **kwargs: Any) -> Any:
            found.append(main_code)

    try:
        Reader.load_pybinding_async(argtypes, source)
    except Exception:  # as kernels are bound in another version of torch
        return None
    return found[0] if len(found) == 1 and found[0].count(_INIT) == 1 else None


def joined(texts: Sequence[str]) -> str:
    """One file of kernels with their bindings, each in a namespace of its own; their includes come first."""
    includes = dict.fromkeys(line.strip() for text in texts for line in _INCLUDE.findall(text))
    bodies = []
    for number, text in enumerate(texts):
        body = _INCLUDE.sub("", text).replace(_ENTRY, "", 1).replace(_INIT, "static PyObject* PyInit_kernel(")
        bodies.append(f"namespace kernel_{number} {{\n{body}\n}}\n")
    parts = ", ".join(f"kernel_{number}::PyInit_kernel" for number in range(len(texts)))
    return "\n".join([*includes, *bodies, _MODULE.format(parts=parts)])
