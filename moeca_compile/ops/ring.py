"""Values cached in a ring: the last K of them, each in a slot, and read as a weighted sum.

A slot whose weight is 0 counts nothing, whatever it holds: it may never have been filled, or may hold what is left of
an ended generation, and 0 times NaN would be NaN. Sums are in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from moeca_compile._torch_private import is_fake


def weighted_sum(slots: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The sum over k of weights[..., k] * slot k, where weights[..., k] broadcasts against a slot."""
    return _sum((weights[..., k], _wide(slot)) for k, slot in enumerate(slots))


def moved_to(fresh: Tensor, slots: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """New values of the slots, of which the weighted sum is `fresh`, while the differences between slots stay.

    Slot k becomes fresh + (slot k - weighted sum). As weights sum to 1, this is fresh + the sum over the other slots
    j of weights[..., j] * (slot k - slot j), which for a single slot is `fresh` to the last bit.
    """
    wide = [_wide(slot) for slot in slots]
    return [
        fresh + _sum((weights[..., j], value - other) for j, other in enumerate(wide) if j != k)
        for k, value in enumerate(wide)
    ]


def by_history(weights: Tensor, history: Tensor) -> Tensor:
    """(..., K) the weights of values that `history` (...) full steps computed: rows of the table (K, K)."""
    return weights[(history.long() - 1).clamp_min(0)]


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _sum(terms: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of weight * value over those terms whose weight is not 0; the number 0 without terms."""
    return reduce(_added, terms, 0)  # type: ignore[return-value, arg-type]


def _added(total: Tensor | float, term: tuple[Tensor, Tensor]) -> Tensor:
    """The total and one more term. Where nothing is traced, in place: a value may be as large as a cache."""
    weight, value = term
    product = weight.to(value.dtype) * value
    if is_fake(product):
        return total + torch.where(weight != 0, product, 0.0)
    product.masked_fill_(weight == 0, 0.0)
    return product.add_(total)
