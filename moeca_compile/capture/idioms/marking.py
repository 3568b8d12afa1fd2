"""What a rewritten method is handed while it is traced: its dispatch as marker ops (ops/markers.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moeca_compile._torch_private import tensors_of_others
from moeca_compile.capture.idioms.base import Paths
from moeca_compile.capture.idioms.choices import Choices
from moeca_compile.capture.idioms.held import ExpertOf, count, expert_of
from moeca_compile.capture.idioms.routed import in_range, tensor_at
from moeca_compile.capture.idioms.routing import NO_READING, Reading, branches, routing
from moeca_compile.ops import markers  # noqa: F401  (defines the ops)

Body = Callable[..., Tensor]


class Shapes(Choices):
    """How the body of one expert sees rows and items (rewriting.py). Traceable."""

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return _as_matrix(a) @ _as_matrix(b)

    def einsum(self, equation: str, a: Tensor, b: Tensor) -> Tensor:
        """The same; as a product of matrices where it is one, which later passes follow row by row."""
        inputs, _, out = equation.replace(" ", "").partition("->")
        of_a, _, of_b = inputs.partition(",")
        matrix = of_b[-2:]
        turned = matrix[1:] == of_a[-1:]
        kept = [letter for letter in out[:-1] if letter in of_a]
        plain = of_a[-1:] in matrix and out[-1:] == matrix.replace(of_a[-1:], "") and kept == list(of_a[:-1])
        if not plain or "." in equation or any([size != 1 for size in b.shape[:-2]]):
            return torch.einsum(equation, a, b)
        b = b.reshape(b.shape[-2:])
        product = a @ (b.t() if turned else b)
        sizes = [product.shape[of_a.index(letter)] if letter in of_a else 1 for letter in out[:-1]]
        return product.reshape(*sizes, product.shape[-1])

    def rows(self, rows: Tensor, dims: int) -> Tensor:
        return rows if dims == 2 else rows.reshape(rows.shape[0], *[1] * (dims - 2), rows.shape[1])

    def item(self, item: Tensor, dims: int) -> Tensor:
        return item.reshape(*[1] * dims, *item.shape)


def _as_matrix(value: Tensor) -> Tensor:
    """One expert's matrix without its leading dimensions of size 1: a product with it is one of matrices."""
    leading = value.shape[:-2]
    return value.reshape(value.shape[-2:]) if len(leading) and all([size == 1 for size in leading]) else value


class Markers(Shapes):
    """The dispatch as marker ops. Traceable.

    may_miss: whether there may be ids that are no expert's
    reading, coupled: of dispatch by token ids, how they lie (routing.py) and whether samples depend on each other
    """

    def __init__(
        self,
        paths: Paths,
        dtype: torch.dtype,
        may_miss: bool = False,
        reading: Reading = NO_READING,
        coupled: bool = False,
    ) -> None:
        self.paths, self.dtype, self.may_miss = paths, dtype, may_miss
        self.reading, self.coupled = reading, coupled

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
        flat = [flat_rows(each) for each in rows]
        index, weight = branches_of(flat[0], index, weight)
        body_out, params, num_experts = self.body(flat, body, items, shared)
        index = index.to(torch.int64) if index.dtype != torch.int64 else index
        if self.may_miss:
            index, weight = in_range(index, weight, num_experts)
        out = torch.ops.moeca.experts_fixed_k(flat[0], index, weight, body_out, params, num_experts)
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
        flat = [flat_rows(each) for each in rows]
        body_out, params, num_experts = self.body(flat, body, items, shared)
        routed, weight = routing(index, weight, self.reading, flat[0].shape[0], num_experts)
        out = torch.ops.moeca.experts_variable_k(
            flat[0], routed, weight, body_out, params, num_experts, branches(index), self.coupled
        )
        return self.result(out, like, rows[0])

    def result(self, out: Tensor, like: Any, rows: Tensor) -> Tensor:
        return shaped(out.to(self.dtype) if out.dtype != self.dtype else out, like, rows)

    def body(
        self, rows: list[Tensor], body: Body, items: tuple[Any, ...], shared: tuple[Any, ...]
    ) -> tuple[Tensor, list[Tensor], int]:
        """Expert 0 on all rows (T, Do), the tensors of all experts, how many there are."""
        firsts = [expert_of(item, 0) for item in items]
        entered = [torch.ops.moeca.expert_rows(each) for each in rows]
        body_out = body(*entered, *firsts, *shared)
        if body_out.dim() != 2:
            body_out = body_out.reshape(rows[0].shape[0], body_out.shape[-1])
        if isinstance(firsts[0], ExpertOf):
            packed, own = firsts[0].items, firsts[0].own
            num_experts = count(packed[0])
            return body_out, own + [each[e] for e in range(1, num_experts) for each in packed], num_experts
        num_experts = count(items[0])
        params = self._params(items, firsts, shared, num_experts)
        return body_out, params, num_experts

    def _params(
        self, items: tuple[Any, ...], firsts: list[Any], shared: tuple[Any, ...], num_experts: int
    ) -> list[Tensor]:
        """The tensors of all items, expert by expert. Those of expert 0 are looked up in `firsts`, as in the body."""
        by_item = []
        for item, first, paths in zip(items, firsts, self.paths[: len(items)], strict=True):
            own = [tensor_at(first, path) for path in paths]
            if isinstance(item, nn.ModuleList):
                rest = tensors_of_others(item, paths, own)
            else:
                rest = [tensor_at(item[number], path) for number in range(1, num_experts) for path in paths]
            by_item.append(own + rest)
        of_all = [
            tensor_at(each, path) for each, at in zip(shared, self.paths[len(items) :], strict=True) for path in at
        ]
        params: list[Tensor] = []
        for number in range(num_experts):
            for tensors in by_item:
                each = len(tensors) // num_experts
                params.extend(tensors[number * each : (number + 1) * each])
            params.extend(of_all)
        return params


def flat_rows(rows: Tensor) -> Tensor:
    return rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1])


def branches_of(x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and weights as (T, k); weights (T, experts) become those of the ids."""
    tokens = x.shape[0]
    index, weight = (each.reshape(tokens, len(range(each.numel() // tokens))) for each in (index, weight))
    if weight.shape[1] != index.shape[1]:
        weight = weight.gather(1, index.to(torch.int64))
    return index, weight


def shaped(out: Tensor, like: Any, rows: Tensor) -> Tensor:
    if isinstance(like, Tensor):
        return out if like.dim() == 2 else out.reshape(like.shape)
    return out if rows.dim() == 2 else out.reshape(*rows.shape[:-1], out.shape[-1])
