"""The C++ kernels as functions of tensors, compiled for this machine when first needed (2 s, then cached)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moeca_compile._torch_private import compile_cpp

_KERNELS = {torch.float32: "grouped_linear_float32", torch.bfloat16: "grouped_linear_bfloat16"}


@cache
def library() -> CDLL | None:
    """The compiled kernels; None, after a warning, where there is no compiler that builds them."""
    try:
        return compile_cpp((Path(__file__).parent / "grouped_linear.cpp").read_text())
    except Exception as error:  # a compiler can be missing or fail in any way
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        warnings.warn(
            f"moeca: the C++ kernels could not be compiled ({reason}), so PyTorch's products stand in and are "
            "slower where rows are few. The kernels need a C++ compiler, as Inductor does (apt install g++).",
            stacklevel=2,
        )
        return None


def takes(rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> bool:
    """Whether `grouped_linear` can run on these: on CPU, contiguous, in one dtype that the kernels know."""
    dtype, (outputs, inputs) = rows.dtype, weights[0].shape
    if rows.device.type != "cpu" or dtype not in _KERNELS or (dtype is torch.bfloat16 and inputs % 2):
        return False
    wanted = (((len(rows), inputs), [rows]), ((outputs, inputs), weights), ((outputs,), biases or ()))
    for shape, operands in wanted:
        if any(v.dtype is not dtype or not v.is_contiguous() or v.shape != shape for v in operands):
            return False
    return hasattr(library(), _KERNELS[dtype])


def grouped_linear(
    rows: Tensor, offsets: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
) -> Tensor:
    """A linear layer of its own for each group of rows; sums are taken in float32.

    Args:
        rows: (R, K), sorted by group; offsets: (G + 1,) int64, where the groups begin, and R.
        weights: G tensors (N, K); biases: G tensors (N), or None. `takes` must hold for them.

    Returns:
        (R, N).
    """
    kernels = library()
    assert kernels is not None
    outputs, inputs = weights[0].shape
    out = rows.new_empty(len(rows), outputs)
    packed = rows.new_empty(len(rows) + len(weights) * kernels.lanes(), inputs)
    run = getattr(kernels, _KERNELS[rows.dtype])
    run.argtypes = [c_void_p] * 4 + [c_int64] * 3 + [c_void_p] * 2 + [c_int]
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
