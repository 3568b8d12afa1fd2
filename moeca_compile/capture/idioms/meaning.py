"""What a rewritten method is handed in its check: the marker ops' meaning as a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moeca_compile.capture.idioms.held import count
from moeca_compile.capture.idioms.marking import Body, Shapes, branches_of, flat_rows, shaped
from moeca_compile.capture.numerics import UntrustedError, require_row_wise
from moeca_compile.capture.structure import named_tensors

_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class Meaning(Shapes):
    """The marker ops' meaning as a plain loop; `dtype` is that of its last result.

    dtype_of: which dtype the result takes, that of what the original adds up in, of its summands, or of branches
    scale: what the result is multiplied by
    """

    def __init__(self, dtype_of: str, scale: float, tolerance: float) -> None:
        self.dtype_of, self.scale, self.tolerance = dtype_of, scale, tolerance
        self.dtype: torch.dtype | None = None

    def experts(
        self,
        like: Any,
        rows: tuple[Tensor, ...],
        index: Tensor,
        weight: Tensor,
        body: Body,
        items: tuple[Any, ...],
        shared: tuple[Any, ...],
    ) -> Tensor:
        _require_closed(body)
        if index.dtype not in _INDEX_DTYPES:
            raise UntrustedError("what it takes expert ids from is no tensor of integers")
        flat = [flat_rows(each) for each in rows]
        if len({len(each) for each in flat}) != 1:
            raise UntrustedError("its experts' inputs have different numbers of rows")
        index, weight = branches_of(flat[0], index, weight)
        first = _Expert(body, [item[0] for item in items], shared)
        require_row_wise(first, flat, first.tensors, self.tolerance)
        out = torch.zeros(0)
        for number in range(count(items[0])):
            token, slot = torch.where(index == number)
            branch = first.with_parameters_of([item[number] for item in items], [each[token] for each in flat])
            if number == 0:
                dtype = torch.promote_types(branch.dtype, weight.dtype)
                wide = torch.promote_types(dtype, torch.float32)
                out = branch.new_zeros(len(flat[0]), branch.shape[-1], dtype=wide)
            out.index_add_(0, token, branch.to(out.dtype) * weight[token, slot, None].to(out.dtype))
        if self.dtype_of == "accumulator" and isinstance(like, Tensor):
            dtype = like.dtype
        elif self.dtype_of == "branch":
            dtype = branch.dtype
        self.dtype = dtype
        return shaped((self.scale * out).to(dtype), like, rows[0])


class _Expert:
    """A body with a copy of one expert's items, in which the parameters of another can be put."""

    def __init__(self, body: Body, items: Sequence[Any], shared: Sequence[Any]) -> None:
        self.body, self.shared = body, shared
        self.items = _Items(copy.deepcopy(list(items)))

    def __call__(self, *rows: Tensor) -> Tensor:
        out = self.body(*rows, *self.items.given(), *self.shared)
        return out.reshape(len(rows[0]), out.shape[-1]) if isinstance(out, Tensor) and out.dim() > 2 else out

    def with_parameters_of(self, items: Sequence[Any], rows: Sequence[Tensor]) -> Tensor:
        """Its own code with the parameters and buffers of another expert's items."""
        out: Tensor = functional_call(self.items, dict(named_tensors(_Items(items))), (self, *rows))
        return out

    def tensors(self) -> Iterator[Tensor]:
        return (tensor for _, tensor in named_tensors(self.items))


class _Items(nn.Module):
    """One expert's items as one module: tensors as buffers. Called with a function of rows, it calls that."""

    def __init__(self, items: Sequence[Any]) -> None:
        super().__init__()
        self.count = len(items)
        for number, item in enumerate(items):
            if isinstance(item, nn.Module):
                self.add_module(f"item_{number}", item)
            else:
                self.register_buffer(f"item_{number}", item.detach())

    def forward(self, expert: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        return expert(*rows)

    def given(self) -> list[Any]:
        return [getattr(self, f"item_{number}") for number in range(self.count)]


def _require_closed(body: Body) -> None:
    for cell in getattr(body, "__closure__", None) or ():
        if isinstance(cell.cell_contents, (Tensor, nn.Module)):
            raise UntrustedError("its experts read a tensor that is neither theirs nor one of rows")
