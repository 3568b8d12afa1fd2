"""Top-k over a short last dim, and marks at chosen columns, in ops that Inductor fuses with those around them.

On CUDA, ATen's topk is two kernels and its scatter two more, and Inductor fuses neither with anything. A router of
16 experts in groups runs five of these a layer, on rows that fit into one kernel together. As comparisons and short
reductions they become a part of the kernels around them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest of the last dim, sorted: x (..., n) of floats -> values and int64 indices (..., k).

    Ties go to the lower index. NaN is the greatest of all and -0.0 equals 0.0, as in torch.topk; a value of -0.0 is
    returned as 0.0. One reduction each round, so for few rounds only.
    """
    keys, columns = _keys(x), torch.arange(x.shape[-1], device=x.device)
    taken = torch.iinfo(keys.dtype).min  # below the key of -inf, so that no column is taken twice
    found, indices = [], []
    for _ in range(k):
        index = keys.argmax(-1, keepdim=True)  # the first of equals
        found.append(keys.amax(-1, keepdim=True))
        indices.append(index)
        keys = torch.where(columns == index, taken, keys)
    return _values(torch.cat(found, -1), x.dtype), torch.cat(indices, -1)


def mark(base: Tensor, index: Tensor, value: float) -> Tensor:
    """`base.scatter(-1, index, value)`: base (..., n), index (..., k) with the same leading dims."""
    columns = torch.arange(base.shape[-1], device=base.device)
    chosen = (index[..., None, :] == columns[:, None]).any(-1)
    return torch.where(chosen, value, base).to(base.dtype)


def _keys(x: Tensor) -> Tensor:
    """Integers in the order of the floats. The bits of a float are, but where the sign is set they count down."""
    wide = x if x.dtype is torch.float64 else x.float()
    bits = wide.view(torch.int64 if x.dtype is torch.float64 else torch.int32)
    most = torch.iinfo(bits.dtype).max
    keys = torch.where(bits < 0, bits ^ most, bits)
    return torch.where(wide == 0, 0, torch.where(wide.isnan(), most, keys))


def _values(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The floats that `_keys` made these of."""
    bits = torch.where(keys < 0, keys ^ torch.iinfo(keys.dtype).max, keys)
    return bits.view(torch.float64 if dtype is torch.float64 else torch.float32).to(dtype)
