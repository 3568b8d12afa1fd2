"""`attend_rows` on CUDA (the reference is in ops.attention).

A kernel writes keys and values, because ATen ops would need the indices of the valid rows on the host. Attention
itself is torch's SDPA: chosen queries against all keys are a dense problem of static shape, for which SDPA has the
best kernels with every mask and head layout. Queries of invalid tokens are computed in vain. A kernel could skip
them, but would have to match FlashAttention on all others.
"""

from __future__ import annotations

from torch import Tensor

from moeca_compile.ops.attention import attend, by_token
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
    write_tokens(keys, values, key, value, chosen, valid)
    return by_token(attend(query, keys, values, mask, scale, enable_gqa))
