"""From what a method keeps of its experts' choices of tokens to one (tokens, experts) mask and its weights.

A reading says how ids and weights lie in memory, which the code does not tell and numbers do:

    (order of the ids, whether they count within a sample, order of the weights)

Orders are those of E experts, B samples and C choices of an expert in a sample, "EC" and "CE" those of ids without
samples; weights may also be there for all tokens T, "TE" or "ET", or "BEN" for the N tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moeca_compile.capture.idioms.choices import MisreadError, count_of, masks_of

Reading = tuple[str, bool, str]
NO_READING: Reading = ("", False, "")

ORDERS = ("BEC", "EC", "BCE", "CE", "EBC")
WHOLE = ("TE", "ET", "BEN")
SAMPLED = {"BEC", "BCE", "EBC"}


def readings() -> Iterator[Reading]:
    """All of them, the likely ones first."""
    for order in ORDERS:
        for within in (False, True):
            yield order, within, order
    for order in ORDERS:
        for within in (False, True):
            yield from ((order, within, other) for other in (*WHOLE, *ORDERS) if other != order)


def routing(index: Any, weight: Any, reading: Reading, tokens: int, experts: int) -> tuple[Tensor, Tensor]:
    """Traceable: (routed, weight), both (tokens, experts). Raises MisreadError.

    Both are lists of what each expert takes of all tokens (choices.py), or tensors that lie as the reading says.
    """
    if isinstance(index, list):
        if len(index) != experts:
            raise MisreadError
        return masks_of(index, tokens), torch.stack([_column(each, tokens) for each in weight], dim=1)
    of_weight = reading[2]
    chosen = token_ids(index, reading, tokens, experts)
    routed = torch.zeros(tokens, experts, dtype=torch.bool, device=chosen.device).scatter(0, chosen, True)
    if of_weight in WHOLE:
        return routed, _of_all(weight, of_weight, tokens, experts)
    given = _by_expert(weight, of_weight, experts)
    if given.numel() != chosen.numel():
        raise MisreadError
    if {reading[0], of_weight} <= SAMPLED and _samples(index, reading[0]) != _samples(weight, of_weight):
        raise MisreadError  # (E, C) with as many experts as choices is not (samples, E, 1)
    weights = torch.zeros(tokens, experts, dtype=weight.dtype, device=weight.device)
    return routed, weights.scatter_add(0, chosen, given.reshape(experts, chosen.shape[0]).t())


def token_ids(index: Tensor, reading: Reading, tokens: int, experts: int) -> Tensor:
    """Traceable: each expert's tokens, counted through the batch, (choices, experts). Raises MisreadError."""
    order, within, _ = reading
    ids = _by_expert(index, order, experts).to(torch.int64)  # (E, B, C)
    if within:
        samples = ids.shape[1]
        if samples * (tokens // samples) != tokens:
            raise MisreadError
        ids = ids + torch.arange(samples, device=ids.device)[:, None] * (tokens // samples)
    return ids.reshape(experts, ids.shape[1] * ids.shape[2]).t()


def branches(index: Any) -> int:
    """Traceable: how many pairs are routed, where the sizes tell; else 0."""
    return sum([count_of(each) for each in index]) if isinstance(index, list) else index.numel()


def _column(weight: Tensor, tokens: int) -> Tensor:
    if weight.numel() != tokens:
        raise MisreadError
    return weight.reshape(tokens)


def _by_expert(values: Tensor, order: str, experts: int) -> Tensor:
    """(E, B, C), with B = 1 where the order has no samples."""
    count = values.numel()
    if order in ("EC", "CE"):
        if count != experts * (count // experts):
            raise MisreadError
        each = count // experts
        return values.reshape(experts, 1, each) if order == "EC" else values.reshape(each, experts).t()[:, None]
    if values.dim() < 2:
        raise MisreadError
    samples = _samples(values, order)
    each = count // (samples * experts)
    if samples * experts * each != count or (order == "EBC" and values.shape[0] != experts):
        raise MisreadError
    if order == "EBC":
        return values.reshape(experts, samples, each)
    if order == "BEC":
        return values.reshape(samples, experts, each).transpose(0, 1)
    return values.reshape(samples, each, experts).permute(2, 0, 1)


def _samples(values: Tensor, order: str) -> int:
    return values.shape[order.index("B")]


def _of_all(weight: Tensor, order: str, tokens: int, experts: int) -> Tensor:
    """(T, E)."""
    if weight.numel() != tokens * experts:
        raise MisreadError
    if order == "TE":
        return weight.reshape(tokens, experts)
    if order == "ET":
        return weight.reshape(experts, tokens).t()
    samples = weight.shape[0]
    if weight.dim() != 3 or weight.shape[1] != experts:
        raise MisreadError
    return weight.reshape(samples, experts, tokens // samples).transpose(1, 2).reshape(tokens, experts)
