"""`attend_rows` by a kernel (ops.attention has its contract).

The write is a kernel of ours, since without one it needs the valid rows' numbers on the host. The attention is
torch's: chosen queries against all keys are a dense problem of static shape, for which SDPA has the device's best
kernels, and it takes every mask and head layout that a model may use. Queries of tokens that are not valid are
computed in vain: a kernel of ours could skip them, but would have to match FlashAttention on all the others.
"""

from __future__ import annotations

from torch import Tensor

from moeca_compile.ops.attention import attend
from moeca_compile.ops.triton.rows import write_tokens


def attend_rows(
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    valid: Tensor,
    mask: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """As `ops.attention.attend_rows`."""
    write_tokens(keys, key, chosen, valid)
    write_tokens(values, value, chosen, valid)
    return attend(query, keys, values, mask, scale, enable_gqa).contiguous()
