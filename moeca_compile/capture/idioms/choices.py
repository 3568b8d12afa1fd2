"""What each expert takes of all tokens, where a turn of the loop over experts tells (turns.py). Traceable.

A choice is a mask over the tokens, or `Ranked`: the tokens that come first in an order, up to a count that the data
tell. A top-k with such a count cannot be traced; the rank of each token among all, under the count, can.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class MisreadError(Exception):
    """What a method keeps of its experts' choices cannot lie as a reading of it says."""


class Ranked(NamedTuple):
    """The first `limit` along the last dimension of `order`, (T,) or (samples, T): the best first."""

    order: Tensor
    limit: Tensor


class Counted(NamedTuple):
    """A mask with so many tokens in it."""

    mask: Tensor
    limit: int


class Top(NamedTuple):
    """A top-k as it is read: the scores of all tokens, and the choice."""

    values: Tensor
    indices: Ranked | Counted


class Choices:
    """What rewritten code calls in place of the ops that choose."""

    def number(self, value: Any) -> Any:
        """What the host would have read of `value`: a number, or the tensor itself."""
        return value if isinstance(value, (Tensor, list)) else int(value)

    def max(self, a: Any, b: Any) -> Any:
        """The larger of two numbers, which may be tensors."""
        if isinstance(b, Tensor):
            return b.clamp(min=a)
        return a.clamp(min=b) if isinstance(a, Tensor) else max(a, b)

    def min(self, a: Any, b: Any) -> Any:
        """The smaller of two numbers, which may be tensors."""
        if isinstance(b, Tensor):
            return b.clamp(max=a)
        return a.clamp(max=b) if isinstance(a, Tensor) else min(a, b)

    def top(self, scores: Tensor, k: Any, dim: int = -1, largest: bool = True) -> Top:
        if isinstance(k, Tensor):
            order = scores.argsort(dim=dim, descending=largest, stable=True)
            return Top(scores, Ranked(order.movedim(dim, -1), k))
        chosen = scores.topk(k, dim=dim, largest=largest).indices
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(dim, chosen, True)
        return Top(scores, Counted(mask, chosen.numel()))

    def first(self, order: Tensor, k: Any) -> Ranked | Counted:
        """The tokens that stand first in an order (T,)."""
        if isinstance(k, Tensor):
            return Ranked(order, k)
        mask = torch.zeros_like(order, dtype=torch.bool).scatter(0, order[:k], True)
        return Counted(mask, len(range(order[:k].shape[0])))

    def placed(self, values: Tensor, order: Tensor) -> Tensor:
        """Sorted values in the tokens' own order, (T,)."""
        return torch.zeros_like(values).scatter(0, order.reshape(values.shape), values)

    def places(self, mask: Tensor, apart: bool) -> Any:
        """The places where a mask holds: the mask, for each dimension as `torch.where` has them, or as a column."""
        return (mask,) * mask.dim() if apart else mask.unsqueeze(-1)


def masks_of(choices: list[Any], tokens: int) -> Tensor:
    """(T, E) from each expert's choice. Raises MisreadError."""
    if isinstance(choices[0], Ranked):
        order = torch.stack([each.order for each in choices])  # (E, T) or (E, samples, T)
        limits = torch.stack([each.limit for each in choices]).reshape(-1, *[1] * (order.dim() - 1))
        places = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
        rank = torch.zeros_like(order).scatter(-1, order, places)
        masks = list((rank < limits).unbind(0))
    else:
        masks = [each.mask if isinstance(each, Counted) else each for each in choices]
    if any([mask.dtype != torch.bool or mask.numel() != tokens for mask in masks]):
        raise MisreadError
    return torch.stack([mask.reshape(tokens) for mask in masks], dim=1)


def count_of(choice: Any) -> int:
    """How many tokens a choice takes, where the sizes tell; else 0."""
    return choice.limit if isinstance(choice, Counted) else 0
