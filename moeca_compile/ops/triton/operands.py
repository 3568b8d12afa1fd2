"""Weights of all experts as tables of addresses, so that one kernel reads them where they are.

The tensors of an expert are parameters of their own, or slices of packed ones; nothing is copied or joined. Tables
are built once for a set of addresses and held.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_compile.ops.unsupported import UnsupportedError

_MOST = 1024
"""Sets of tables that are held, one a layer, of a few hundred bytes each."""


@dataclass(frozen=True)
class Operand:
    """One weight or bias of all experts.

    Attributes:
        table: (E,) int64 addresses on the device.
        source: the same in pinned memory: a copy that is captured reads it again whenever the graph runs.
        shape, strides, itemsize: of each expert's tensor.
        aligned: whether each expert's tensor begins at a multiple of 16 bytes.
    """

    table: Tensor
    source: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    aligned: bool


def operand(tensors: Sequence[Tensor]) -> Operand:
    """The operand of one tensor an expert. Raises UnsupportedError where their layouts differ."""
    one = tensors[0]
    if any((t.shape, t.stride(), t.dtype) != (one.shape, one.stride(), one.dtype) for t in tensors):
        raise UnsupportedError("the experts' parameters differ in shape, strides or dtype")
    pointers = [tensor.data_ptr() for tensor in tensors]
    source = torch.tensor(pointers, dtype=torch.int64)
    if one.is_cuda:
        source = source.pin_memory()  # so that the copy is ordered by the stream and waits for nothing
    table = source.to(one.device, non_blocking=True)
    aligned = all(address % 16 == 0 for address in pointers)
    return Operand(table, source, tuple(one.shape), one.stride(), one.element_size(), aligned)


def addresses(tensors: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """What tells whether tables that were built from `tensors` still hold."""
    return tuple((tensor.data_ptr(), tensor.stride()) for tensor in tensors)


_Operands = tuple[Operand, ...]
_tables: OrderedDict[Hashable, _Operands] = OrderedDict()
_captured: list[_Operands] = []


def memoized(key: Hashable, build: Callable[[], tuple[_Operands, bool]]) -> _Operands:
    """The operands of a key, built by `build` where they are not known; it also says whether they last.

    Those of parameters last, those of what a step computes from parameters do not. What is used in the capture of a
    CUDA graph is held for good, since the graph knows it by address alone; what is built there is filled when the
    graph runs, so nothing else may use it.
    """
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    found = _tables.get(key)
    if found is None:
        found, lasts = build()
        if lasts and not capturing:
            _tables[key] = found
    if key in _tables:
        _tables.move_to_end(key)
    while len(_tables) > _MOST:
        _tables.popitem(last=False)
    if capturing:
        _captured.append(found)
    return found
