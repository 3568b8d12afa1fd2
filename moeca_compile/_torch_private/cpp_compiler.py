"""The C++ compiler as Inductor calls it: for sources of ours, and made ready before Inductor asks."""

from __future__ import annotations

from ctypes import CDLL

from moeca_compile._torch_private.lookup import Private

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
    library = _CPP.value.load(source)
    assert isinstance(library, CDLL)
    return library


def ready_cpp_compiler() -> None:
    """Compile a kernel that does nothing, so that Inductor knows what this machine can do and has its headers ready.

    Raises whatever the compiler's failure raises.
    """
    if _BINDINGS.value is not None:
        _BINDINGS.value.load_pybinding(["float*"], _KERNEL)
