"""What a rewritten method is handed in its check: the marker ops' meaning as a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moeca_compile.capture.idioms.choices import MisreadError, Ranked
from moeca_compile.capture.idioms.held import ExpertOf, counted, expert_of
from moeca_compile.capture.idioms.marking import Body, Shapes, branches_of, flat_rows, shaped
from moeca_compile.capture.idioms.routing import NO_READING, Reading, routing, token_ids
from moeca_compile.capture.numerics import UntrustedError, require_row_wise
from moeca_compile.capture.structure import named_tensors

_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class Meaning(Shapes):
    """The marker ops' meaning as a plain loop; `dtype` is that of its last result.

    dtype_of: which dtype the result takes, that of what the original adds up in, of its summands, or of branches
    scale: what the result is multiplied by
    reading: of dispatch by token ids, how they lie (routing.py); `routed` and `weight` are what it came to, and
        `counted_by_data` says that the data tell how many tokens an expert takes
    """

    counted_by_data: bool
    routed: Tensor
    weight: Tensor
    branch: torch.dtype
    product: torch.dtype

    def __init__(self, dtype_of: str, scale: float, tolerance: float, reading: Reading = NO_READING) -> None:
        self.dtype_of, self.scale, self.tolerance, self.reading = dtype_of, scale, tolerance, reading
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

        def of_expert(number: int) -> tuple[Tensor, Tensor]:
            token, slot = torch.where(index == number)
            return token, weight[token, slot, None]

        out = self.summed(flat, weight.dtype, of_expert, body, items, shared)
        return self.result(out, like, rows[0])

    def pairs(
        self,
        like: Any,
        rows: tuple[Tensor, ...],
        index: Any,
        weight: Any,
        body: Body,
        items: tuple[Any, ...],
        shared: tuple[Any, ...],
    ) -> Tensor:
        _require_closed(body)
        flat = [flat_rows(each) for each in rows]
        experts = counted(items[0])
        if isinstance(index, Tensor):
            if index.dtype not in _INDEX_DTYPES:
                raise UntrustedError("what it takes token ids from is no tensor of integers")
            chosen = token_ids(index, self.reading, len(flat[0]), experts)
            if chosen.min() < 0 or chosen.max() >= len(flat[0]):
                raise MisreadError  # before an op sees them: on a GPU it could not be recovered from
        self.counted_by_data = isinstance(index, list) and any(isinstance(each, Ranked) for each in index)
        self.routed, self.weight = read = routing(index, weight, self.reading, len(flat[0]), experts)

        def of_expert(number: int) -> tuple[Tensor, Tensor]:
            token = torch.where(read[0][:, number])[0]
            return token, read[1][token, number, None]

        out = self.summed(flat, self.weight.dtype, of_expert, body, items, shared)
        return self.result(out, like, rows[0])

    def summed(
        self,
        rows: list[Tensor],
        weight: torch.dtype,
        of_expert: Callable[[int], tuple[Tensor, Tensor]],
        body: Body,
        items: tuple[Any, ...],
        shared: tuple[Any, ...],
    ) -> Tensor:
        """(T, Do) in at least float32: each expert's outputs on its tokens, by its weights, added up."""
        first = _first(body, items, shared)
        require_row_wise(first, rows, first.tensors, self.tolerance)
        out = torch.zeros(0)
        for number in range(counted(items[0])):
            token, factor = of_expert(number)
            branch = first.of_expert(number, items, [each[token] for each in rows])
            if number == 0:
                out = self.begun(branch, len(rows[0]), weight)
            out.index_add_(0, token, branch.to(out.dtype) * factor.to(out.dtype))
        return out

    def begun(self, branch: Tensor, count: int, weight: torch.dtype) -> Tensor:
        """Zeros (count, Do), to which branches are added: in at least float32."""
        self.branch, self.product = branch.dtype, torch.promote_types(branch.dtype, weight)
        return branch.new_zeros(count, branch.shape[-1], dtype=torch.promote_types(self.product, torch.float32))

    def result(self, out: Tensor, like: Any, rows: Tensor) -> Tensor:
        self.dtype = self.branch if self.dtype_of == "branch" else self.product
        if self.dtype_of == "accumulator" and isinstance(like, Tensor):
            self.dtype = like.dtype
        return shaped((self.scale * out).to(self.dtype), like, rows)


class RoutingAlone(Meaning):
    """The same for what is routed alone: no expert runs on more than a row, and sums are zeros."""

    def summed(
        self,
        rows: list[Tensor],
        weight: torch.dtype,
        of_expert: Callable[[int], tuple[Tensor, Tensor]],
        body: Body,
        items: tuple[Any, ...],
        shared: tuple[Any, ...],
    ) -> Tensor:
        return self.begun(_first(body, items, shared)(*(each[:1] for each in rows)), len(rows[0]), weight)


def _first(body: Body, items: tuple[Any, ...], shared: tuple[Any, ...]) -> _Bank | _Expert:
    """What runs the experts, called as the first of them."""
    if isinstance(expert_of(items[0], 0), ExpertOf):
        return _Bank(body, items, shared)
    return _Expert(body, [item[0] for item in items], shared)


class _Bank:
    """A body that runs one expert of a module that holds them all, the first unless another is asked for."""

    def __init__(self, body: Body, items: Sequence[Any], shared: Sequence[Any]) -> None:
        if len(items) != 1:
            raise UntrustedError("its experts are held by a module and beside it too")
        self.body, self.bank, self.shared = body, items[0], shared

    def __call__(self, *rows: Tensor) -> Tensor:
        return self.of_expert(0, (), rows)

    def of_expert(self, number: int, _: Sequence[Any], rows: Sequence[Tensor]) -> Tensor:
        return self.body(*rows, ExpertOf(self.bank, number), *self.shared)

    def tensors(self) -> Iterator[Tensor]:
        return (tensor for _, tensor in named_tensors(self.bank))


class _Expert:
    """A body with a copy of one expert's items, in which the parameters of another can be put."""

    def __init__(self, body: Body, items: Sequence[Any], shared: Sequence[Any]) -> None:
        self.body, self.shared = body, shared
        self.items = _Items(copy.deepcopy(list(items)))

    def __call__(self, *rows: Tensor) -> Tensor:
        out = self.body(*rows, *self.items.given(), *self.shared)
        return out.reshape(len(rows[0]), out.shape[-1]) if isinstance(out, Tensor) and out.dim() > 2 else out

    def of_expert(self, number: int, items: Sequence[Any], rows: Sequence[Tensor]) -> Tensor:
        """Its own code with the parameters and buffers of another expert's items."""
        own = _Items([item[number] for item in items])
        out: Tensor = functional_call(self.items, dict(named_tensors(own)), (self, *rows))
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
