"""Attention of chosen queries against cached keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("moeca", "FRAGMENT")
_library.define(
    "attend_rows(Tensor(a!) keys, Tensor(b!) values, Tensor query, Tensor key, Tensor value, Tensor chosen, "
    "Tensor valid, float? scale, bool enable_gqa) -> Tensor"
)


def attend_rows(
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    valid: Tensor,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Write the chosen tokens' keys and values into the caches, then attend from their queries to all tokens.

    Args:
        keys, values: (B, H, N, d) caches, written in place.
        query, key, value: (B, H, C, d) of the chosen tokens.
        chosen: (B, C) token indices, distinct within a sample; valid: (B, C), false entries are not written.
        scale, enable_gqa: as in scaled_dot_product_attention.

    Returns:
        (B, H, C, d) attention outputs of the chosen tokens (also of those that are not valid).
    """
    for cache, fresh in ((keys, key), (values, value)):
        index = chosen[:, None, :, None].expand_as(fresh)
        keep = valid[:, None, :, None]
        cache.scatter_(2, index, torch.where(keep, fresh.to(cache.dtype), cache.gather(2, index)))
    result = F.scaled_dot_product_attention(
        query, keys.to(query.dtype), values.to(query.dtype), scale=scale, enable_gqa=enable_gqa
    )
    return result.contiguous()


_library.impl("attend_rows", attend_rows, "CompositeExplicitAutograd")


@torch.library.register_fake("moeca::attend_rows", lib=_library)
def _(keys, values, query, key, value, chosen, valid, scale, enable_gqa):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:-1], value.shape[-1])
