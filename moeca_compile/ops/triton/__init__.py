"""The ops on CUDA: Triton kernels that never make the host wait for the device.

The ATen functions of `ops.fixed_k`, `ops.attention` and `ops.variable_k` are their reference, and run on all other
devices. Here, counts and offsets stay on the device, and buffers have the largest size that the shapes allow, so that
a step can be recorded as one CUDA graph. docs/gpu-kernels.md explains the design.

    compaction   the branches of a mask, sorted by expert
    grouped      grouped products with activation and gating: each expert's rows by its own weight, in one launch
    rows         writes rows where a mask says so, and computes the norms of recomputed branches
    combine      weighted sums over a token's branches
    body_plan    finds the ops of an expert's body that a grouped product absorbs; body_run runs such plans
    fixed_k, variable_k, attention, routing   the ops
    fallback     runs the ATen functions where the kernels cannot run a body

Matching, scores and thresholds have no kernels: they are pointwise ops and small reductions of static shape,
which Inductor fuses into one or two kernels with their surroundings.

Without Triton, or with a torch built without CUDA, nothing of this package is imported but this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["available", "fallback_refused", "register", "why_not"]


def available() -> bool:
    """Whether torch was built for CUDA and Triton is installed."""
    return torch.version.cuda is not None and find_spec("triton") is not None


def register(library: torch.library.Library) -> None:
    """Register the kernels as the CUDA implementation of the ops."""
    from moeca_compile.ops.triton import attention, fixed_k, routing, variable_k

    for op in (
        fixed_k.fixed_k_outputs,
        fixed_k.fixed_k_outputs_into,
        fixed_k.refresh_fixed_k,
        attention.attend_rows,
        variable_k.variable_k_outputs,
        variable_k.variable_k_outputs_into,
        variable_k.refresh_variable_k,
        routing.choose_experts,
    ):
        library.impl(op.__name__, _on_its_device(op), "CUDA")


def _on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the first argument, like ATen ops, and not on the current device."""

    @wraps(op)
    def run(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]  # some take a list of tensors first
        with torch.cuda.device_of(first):
            return op(*args)

    return run


def why_not(
    device: torch.device, body: str, rows: Sequence[Tensor], parameters: Sequence[Tensor], experts: int
) -> str | None:
    """Why experts with this body run by the ATen functions, which make the host wait for the device at every step.

    None if kernels can run them, and on a CPU. Only shapes, strides and dtypes are read, so tensors may be fake.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda" or not available():
        return f"there are no kernels for {device.type} here (they need torch for CUDA, and Triton)"
    from moeca_compile.ops.triton import fallback

    return fallback.why_not(body, rows, parameters, experts)


def fallback_refused() -> AbstractContextManager[None]:
    """Inside, an op that the kernels cannot run raises UnsupportedError: for checks that must see a kernel run."""
    from moeca_compile.ops.triton import fallback

    return fallback.refused()
