"""What the arguments of a call tell of the stream that it belongs to.

Conditional and unconditional passes, and the requests of two users, differ in their labels or texts. On the CPU
these are compared by value. On an accelerator that would make the host wait for the device, so there tensors are
compared by identity and version: samplers pass the same ones at every step.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SAMPLED = 4096
"""So many elements of a tensor on the CPU are compared, evenly spread over it."""


@dataclass(frozen=True)
class Value:
    """A value, or the values of a tensor on the CPU."""

    form: Any
    content: Any

    def same(self, earlier: object) -> bool | None:
        return self == earlier


class Identity:
    """A tensor on an accelerator, by identity and version."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = weakref.ref(tensor), _version(tensor)

    def same(self, earlier: object) -> bool | None:
        """Whether it is the tensor of an earlier call; None where that cannot be known: a tensor that is no more was
        made anew for each step, and one that was changed in place may hold anything."""
        if not isinstance(earlier, Identity):
            return False
        before = earlier.tensor()
        if before is None:
            return None
        if before is not self.tensor():
            return False
        return True if self.version == earlier.version else None


Mark = Value | Identity
Marks = Mapping[str, Mark]
"""Marks of a call's arguments by name."""


def mark(value: Any) -> Mark:
    """What tells an argument from others."""
    if not isinstance(value, Tensor):
        return Value(type(value), value)
    if value.device.type != "cpu":
        return Identity(value)
    return Value((value.shape, value.dtype), _sample(value))


def _sample(value: Tensor) -> bytes:
    flat = value.detach().reshape(-1)
    if len(flat) > _SAMPLED:
        flat = flat[:: -(-len(flat) // _SAMPLED)]
    content: bytes = flat.contiguous().view(torch.uint8).numpy().tobytes() if len(flat) else b""
    return content


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def compare(now: Marks, earlier: Marks, ignored: frozenset[str] | set[str]) -> tuple[int, set[str]]:
    """How many arguments are those of an earlier call, and which are surely others."""
    same, other = 0, now.keys() ^ earlier.keys()
    for name in now.keys() & earlier.keys():
        answer = now[name].same(earlier[name])
        same += answer is True
        if answer is False:
            other = other | {name}
    return same, other - ignored
