"""Weights of all experts as tables of addresses, so that one kernel can read them all without a copy.

An expert's tensors may be separate parameters or slices of packed ones. Tables are built once for a set of addresses
and cached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_compile.ops.unsupported import UnsupportedError

_MOST = 1024
"""How many sets of tables are cached: one a layer, of a few hundred bytes each."""


@dataclass(frozen=True)
class Operand:
    """One weight or bias of all experts.

    Attributes:
        table: (E,) int64 addresses on the device.
        source: the same in pinned memory; a recorded copy reads it again at every replay.
        shape, strides, itemsize: those of each expert's tensor.
        aligned: whether each expert's tensor begins at a multiple of 16 bytes.
    """

    table: Tensor
    source: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    aligned: bool


def operand(tensors: Sequence[Tensor]) -> Operand:
    """The operand for one tensor of each expert. Raises UnsupportedError if shapes, strides or dtypes differ."""
    one = tensors[0]
    if any((t.shape, t.stride(), t.dtype) != (one.shape, one.stride(), one.dtype) for t in tensors):
        raise UnsupportedError("the experts' parameters differ in shape, strides or dtype")
    pointers = [tensor.data_ptr() for tensor in tensors]
    source = torch.tensor(pointers, dtype=torch.int64)
    if one.is_cuda:
        source = source.pin_memory()  # so that the copy is asynchronous
    table = source.to(one.device, non_blocking=True)
    aligned = all(address % 16 == 0 for address in pointers)
    return Operand(table, source, tuple(one.shape), one.stride(), one.element_size(), aligned)


def addresses(tensors: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """A key that changes whenever tables built from `tensors` become invalid."""
    return tuple((tensor.data_ptr(), tensor.stride()) for tensor in tensors)


_Operands = tuple[Operand, ...]
_tables: OrderedDict[Hashable, _Operands] = OrderedDict()
_captured: list[_Operands] = []


def memoized(key: Hashable, build: Callable[[], tuple[_Operands, bool]]) -> _Operands:
    """The cached operands of a key, or those that `build` returns, with whether they may be cached.

    Operands of parameters may be cached; those of values that a step computes from parameters may not. Operands that
    a CUDA graph is recorded with are never freed, since the graph reads their addresses. Operands built during
    recording are filled only when the graph runs, so they are not cached for other use.
    """
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    found = _tables.get(key)
    if found is None:
        found, may_cache = build()
        if may_cache and not capturing:
            _tables[key] = found
    if key in _tables:
        _tables.move_to_end(key)
    while len(_tables) > _MOST:
        _tables.popitem(last=False)
    if capturing:
        _captured.append(found)
    return found
