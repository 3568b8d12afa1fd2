"""Activations that a grouped product applies before it writes, each in float32."""

from __future__ import annotations

import triton
import triton.language as tl

RELU, SILU, GELU, GELU_TANH = "relu", "silu", "gelu", "gelu_tanh"
"""Names that a kernel is given, since it takes no function; any other name stands for none."""


@triton.jit
def activate(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """x (float32) under the activation of that name."""
    if KIND == "relu":
        return tl.where(x < 0, 0.0, x)  # keeps NaN, as torch.relu does
    elif KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2u), which needs no tanh of a device library.
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return x
