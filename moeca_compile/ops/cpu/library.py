"""The C++ kernels as functions of tensors. They are compiled at first use (a second each) and cached on disk."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeca_compile._torch_private import compile_cpp, cpp_compiler_is_busy
from moeca_compile.text import first_line

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_ARGUMENTS = {
    "grouped_linear": [c_void_p] * 4 + [c_int64] * 3 + [c_void_p] * 2 + [c_int],
    "combine": [c_void_p] * 2 + [c_int64] * 4 + [c_void_p, c_int],
}


@cache
def library(source: str) -> CDLL | None:
    """The compiled kernels of `source`.cpp beside this file; None, after a warning, if they do not compile."""
    try:
        return compile_cpp((Path(__file__).parent / f"{source}.cpp").read_text())
    except Exception as error:  # a compiler can be missing or fail in any way
        _warn(first_line(error))
        return None


@cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"moeca: the C++ kernels could not be compiled ({reason}). PyTorch's own ops run instead, which are slower "
        "for products with few rows. Install a C++ compiler, which Inductor needs too (apt install g++).",
        stacklevel=3,
    )


def _kernel(source: str, dtype: torch.dtype) -> Any:
    """The function of `source` for a dtype; None where there is none."""
    function = getattr(library(source), f"{source}_{_NAMES[dtype]}", None) if dtype in _NAMES else None
    if function is not None and function.argtypes is None:
        function.argtypes = _ARGUMENTS[source]
    return function


def takes(rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> bool:
    """Whether `grouped_linear` can run on these: on CPU, contiguous, and all in one supported dtype."""
    dtype, (outputs, inputs) = rows.dtype, weights[0].shape
    if rows.device.type != "cpu" or dtype not in _NAMES or (dtype is torch.bfloat16 and inputs % 2):
        return False
    wanted = (((len(rows), inputs), [rows]), ((outputs, inputs), weights), ((outputs,), biases or ()))
    for shape, operands in wanted:
        if any(v.dtype is not dtype or not v.is_contiguous() or v.shape != shape for v in operands):
            return False
    return not cpp_compiler_is_busy() and _kernel("grouped_linear", dtype) is not None  # PyTorch's ops run meanwhile


def grouped_linear(
    rows: Tensor, offsets: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
) -> Tensor:
    """Apply a separate linear layer to each group of rows, with sums in float32. `takes` must hold.

    Args:
        rows: (R, K), sorted by group.
        offsets: (G + 1,) int64, where the groups begin; the last is R.
        weights: G tensors (N, K); biases: G tensors (N,), or None.

    Returns:
        (R, N).
    """
    kernels, run = library("grouped_linear"), _kernel("grouped_linear", rows.dtype)
    assert kernels is not None
    outputs, inputs = weights[0].shape
    out = rows.new_empty(len(rows), outputs)
    packed = rows.new_empty(len(rows) + len(weights) * kernels.lanes(), inputs)
    run(
        rows.data_ptr(),
        offsets.data_ptr(),
        _pointers(weights),
        _pointers(biases) if biases is not None else None,
        len(weights),
        inputs,
        outputs,
        out.data_ptr(),
        packed.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _pointers(tensors: Sequence[Tensor]) -> object:
    return (c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def combine(ring: Sequence[Tensor], factors: Tensor) -> Tensor | None:
    """Sum over branches and slots of factor * cached output, in float32 and rounded once (paper, eq. 8).

    Args:
        ring: K tensors (..., k, width) of one dtype.
        factors: (..., k, K) what each slot of each branch counts; where it is 0, the slot is not read.

    Returns:
        (..., width) in the dtype of the ring; None where the kernel cannot run: tensors that are not contiguous, not
        on CPU, of other dtypes, or of shapes that do not match.
    """
    first = ring[0]
    known = all(v.is_contiguous() and v.device.type == "cpu" and v.dtype is first.dtype for v in ring)
    fits = all(v.shape == first.shape for v in ring) and factors.shape == (*first.shape[:-1], len(ring))
    run = _kernel("combine", first.dtype) if known and fits and not cpp_compiler_is_busy() else None
    if run is None:
        return None
    factors = factors.to(torch.float32).contiguous()
    *outer, branches, width = first.shape
    out = first.new_empty(*outer, width)
    run(
        _pointers(ring),
        factors.data_ptr(),
        first.shape[:-2].numel(),
        branches,
        len(ring),
        width,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
