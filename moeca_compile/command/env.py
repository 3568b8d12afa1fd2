"""`moeca env`: what a bug report should say of the machine and its software."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from shutil import which

import torch

import moeca_compile
from moeca_compile._torch_private import missing
from moeca_compile.free_memory import free_bytes
from moeca_compile.ops import triton
from moeca_compile.ops.cpu.library import library
from moeca_compile.text import binary_bytes

_PACKAGES = ("triton", "numpy", "sympy", "diffusers", "transformers", "accelerate")
_CPU_KERNELS = ("grouped_linear", "combine")


def environment() -> dict[str, str]:
    """What is there, by name, in the order in which it is told."""
    return {
        "moeca_compile": moeca_compile.__version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        **{package: _installed(package) for package in _PACKAGES},
        **dict(_devices()),
        "C++ compiler": os.environ.get("CXX") or which("g++") or which("clang++") or "none: install g++",
        "CPU kernels": ", ".join(f"{name} {_cpu_kernel(name)}" for name in _CPU_KERNELS),
        "GPU kernels": "Triton" if triton.available() else f"none: {_why_no_triton()}",
        "missing in torch": ", ".join(missing()) or "nothing",
    }


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{platform.machine()}, {torch.get_num_threads()} threads, {_free(torch.device('cpu'))}"
    for index in range(torch.cuda.device_count()):
        device, (major, minor) = torch.device("cuda", index), torch.cuda.get_device_capability(index)
        yield str(device), f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}, {_free(device)}"


def _free(device: torch.device) -> str:
    free = free_bytes(device)
    return f"{binary_bytes(free)} free" if free is not None else "free memory unknown"


def _cpu_kernel(name: str) -> str:
    return "compiled" if library(name) is not None else "not compiled, PyTorch's ops run"


def _why_no_triton() -> str:
    return "torch is built without CUDA" if torch.version.cuda is None else "Triton is not installed"
