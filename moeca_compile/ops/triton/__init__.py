"""The ops' implementation on CUDA: Triton kernels that never ask the host anything.

The ATen functions of `ops.fixed_k`, `ops.attention` and `ops.variable_k` are the reference, and what runs on every
other device. Here counts and offsets stay on the device and all buffers have the capacity that the shapes give, so
that a step could be captured as one CUDA graph. docs/gpu-kernels.md has the design and its floors.

    compaction   which branches run, sorted by expert
    grouped      each expert's rows by its own weight, in one launch, with activation and gating
    rows         what is written where a mask says so, with the norms of recomputed branches
    combine      weighted sums over a token's branches
    body_plan    what of an expert's body a grouped product takes in; body_run is the provider of such plans
    fixed_k, variable_k, attention   the ops
    fallback     the ATen functions, where the kernels cannot run a body

Routing, matching, scores and thresholds are no ops of ours: they are pointwise work and small reductions of static
shape, which Inductor fuses into a kernel or two, and a kernel of ours would only stand in the way of that.

The package is optional: without Triton, or with a torch that has no CUDA, nothing here is imported but `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["available", "register", "why_not"]


def available() -> bool:
    """Whether torch was built for CUDA and Triton is installed."""
    return torch.version.cuda is not None and find_spec("triton") is not None


def register(library: torch.library.Library) -> None:
    """Give the package's ops their implementation on CUDA."""
    from moeca_compile.ops.triton import attention, fixed_k, variable_k

    for op in (
        fixed_k.fixed_k_outputs,
        fixed_k.refresh_fixed_k,
        attention.attend_rows,
        variable_k.variable_k_outputs,
        variable_k.refresh_variable_k,
    ):
        library.impl(op.__name__, _on_its_device(op), "CUDA")


def _on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the first argument, whichever is the current one, as ATen's ops do."""

    @wraps(op)
    def run(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with torch.cuda.device_of(first):
            return op(*args)

    return run


def why_not(
    device: torch.device, body: str, rows: Sequence[Tensor], parameters: Sequence[Tensor], experts: int
) -> str | None:
    """Why experts of this body run by the ATen functions, which wait for the device at every step.

    None on a CPU, where nothing waits, and where kernels run them. Needs shapes, strides and dtypes only, so it can
    be asked of fake tensors when a graph is planned.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda" or not available():
        return f"there are no kernels for {device.type} here (they need torch for CUDA, and Triton)"
    from moeca_compile.ops.triton import fallback

    return fallback.why_not(body, rows, parameters, experts)
