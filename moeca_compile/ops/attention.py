"""Attention of chosen queries against cached keys and values.

    attend_rows(keys, values, query, key, value, chosen, valid, mask, scale, enable_gqa) -> out

        keys[chosen[c]] = key[c], values[chosen[c]] = value[c]    where valid[c]
        out = softmax(query @ keys.T * scale + mask) @ values

The function below implements the op on every device without a kernel (CUDA has one, `ops.triton.attention`). The fake
at the end of the file gives the output shape.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("moeca", "FRAGMENT")
_library.define(
    "attend_rows(Tensor(a!) keys, Tensor(b!) values, Tensor query, Tensor key, Tensor value, Tensor chosen, "
    "Tensor valid, Tensor? mask, float? scale, bool enable_gqa) -> Tensor"
)


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
    """Write the chosen tokens' keys and values into the caches, then attend from their queries to all tokens.

    Args:
        keys, values: (B, N, H, d) caches, written in place. A token's heads are contiguous, so it is one copy.
        query, key, value: (B, H, C, d) of the chosen tokens.
        chosen: (B, C) token indices, distinct within a sample.
        valid: (B, C) bool; keys and values of entries that are false are not written.
        mask: for the queries, as in scaled_dot_product_attention, like scale and enable_gqa.

    Returns:
        (B, H, C, d) attention outputs of all chosen tokens, valid or not, laid out as (B, C, H, d).
    """
    samples, tokens = keys.shape[:2]
    first = torch.arange(samples, device=chosen.device)[:, None] * tokens
    written = valid.flatten().nonzero().squeeze(1)
    tokens_written = (chosen + first).flatten()[written]
    for cache, fresh in ((keys, key), (values, value)):
        rows = fresh.transpose(1, 2).flatten(0, 1).index_select(0, written)
        cache.flatten(0, 1).index_copy_(0, tokens_written, rows.to(cache.dtype))
    return by_token(attend(query, keys, values, mask, scale, enable_gqa))


def by_token(out: Tensor) -> Tensor:
    """(B, H, C, d) with a token's heads beside each other in memory: as attention kernels write it, without a copy,
    and as the projection after them reads it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None, enable_gqa: bool
) -> Tensor:
    """Queries (B, H, C, d) against cached keys and values (B, N, H, d).

    On CPU, 16-bit dtypes are computed in float32: with 32 queries PyTorch's kernel for 16 bits is a quarter slower.
    """
    narrow = query.device.type == "cpu" and query.dtype.itemsize == 2
    dtype = torch.float32 if narrow else query.dtype
    keys, values = (cache.transpose(1, 2).to(dtype) for cache in (keys, values))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    out = F.scaled_dot_product_attention(query.to(dtype), keys, values, mask, scale=scale, enable_gqa=enable_gqa)
    return out.to(query.dtype)


_library.impl("attend_rows", attend_rows, "CompositeExplicitAutograd")


@torch.library.register_fake("moeca::attend_rows", lib=_library)
def _(keys, values, query, key, value, chosen, valid, mask, scale, enable_gqa):  # type: ignore[no-untyped-def]
    samples, heads, count, _ = query.shape
    return query.new_empty(samples, count, heads, value.shape[-1]).transpose(1, 2)
