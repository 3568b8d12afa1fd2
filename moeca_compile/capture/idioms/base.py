"""What an idiom is: a way of writing MoE dispatch, recognised in code, and its traceable equivalent.

An idiom whose method is handed the rows, the expert ids and the weights (most are) writes `recognise` only
and takes the other three functions from `routed.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeca_compile.capture.source import Method

Path = tuple[str, ...]
"""The way to a parameter from its expert: ("mlp", "0", "weight")."""

Trusted = tuple[tuple[Path, ...], torch.dtype]
"""What an equivalent needs of a layer: the paths of an expert's parameters, the dtype of the result."""

Facts = tuple[Any, ...]
"""Constants about the arguments of one call, known while tracing: sizes, dtypes, layouts, device."""


@dataclass(frozen=True)
class Recognised:
    """The roles in a recognised method.

    experts: the attribute of self that holds the list of experts
    parameters: all parameters in order, without self
    x, index, weight: which of them are the rows (T, D), the expert ids, the weights
    """

    experts: str
    parameters: tuple[str, ...]
    x: str
    index: str
    weight: str


@dataclass(frozen=True)
class Trial:
    """Random arguments of the original method, in its order; the same as x (T, D), index, weight (T, k)."""

    arguments: tuple[Tensor, ...]
    x: Tensor
    index: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Idiom:
    """One way of writing MoE dispatch.

    name: for messages
    hints: names that occur in every such method (attributes, methods, globals): a cheap test on its code
    recognise: the roles in a method's code, None where it is no such method; never by names of classes
    facts: traceable; what `trial` and the check must know about a call, or why it is not supported
    trial: random calls, for a layer of so many experts; together they use every expert and leave the first
        and the last without a token in turn, where k allows it
    equivalent: traceable; (recognised, trusted, module, args, kwargs) -> the method's result, through markers
    """

    name: str
    hints: frozenset[str]
    recognise: Callable[[Method], Recognised | None]
    facts: Callable[[Recognised, tuple[Any, ...], dict[str, Any]], Facts | str]
    trial: Callable[[Recognised, Facts, int], Iterator[Trial]]
    equivalent: Callable[[Recognised, Trusted, nn.Module, tuple[Any, ...], dict[str, Any]], Tensor]
