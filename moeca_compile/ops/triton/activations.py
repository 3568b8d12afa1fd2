"""Activations that a grouped product applies to its result, in float32."""

from __future__ import annotations

import triton
import triton.language as tl

RELU, SILU, GELU, GELU_TANH = "relu", "silu", "gelu", "gelu_tanh"
"""The names that select an activation in a kernel; any other name selects none."""


@triton.jit
def activate(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Apply the activation of that name to x (float32)."""
    if KIND == "relu":
        return tl.where(x < 0, 0.0, x)  # keeps NaN, as torch.relu does
    elif KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), which needs no tanh from a device library.
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return x
