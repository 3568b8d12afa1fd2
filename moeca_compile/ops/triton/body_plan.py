"""Plan an expert's body for kernels: as in `ops.body_plan`, but products absorb activations and gating.

    act(x @ G.T) * (x @ U.T)   one gated product; G and U are two weights, or halves of one in either order
    act(x @ W.T + b)           one product
    x @ W.T + b, x @ W         one product
    any other op on rows       the op itself; if it reads parameters, it must be pointwise or a norm, since each row
                               takes those of its expert
    any op on parameters       the op itself, once for each expert; views cost nothing

SwiGLU, and an MLP with GELU, are two kernels and nothing else. Any other body raises UnsupportedError.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.ops import bodies
from moeca_compile.ops.aten import COPIES, NORMS, SPLITS, VIEWS
from moeca_compile.ops.body_plan import NONE, ROWS, BodyPlan, GroupedProduct, LinearSlice, Planner, name_of, plan_for
from moeca_compile.ops.triton.activations import GELU, GELU_TANH, RELU, SILU
from moeca_compile.ops.triton.grouped import DTYPES
from moeca_compile.ops.unsupported import UnsupportedError

aten = torch.ops.aten

_SAME_ROWS = VIEWS | COPIES | {aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default}
"""Ops that may leave each row one row of the same values, with other dims or in other memory."""


def kernel_plan(body: str, rows: Sequence[Tensor], parameters: Sequence[Tensor], experts: int) -> BodyPlan:
    """The plan of a registered body for `rows` each (T, ...) and expert-major parameters. Raises UnsupportedError."""
    if bodies.exchange_of(body)[0]:
        raise UnsupportedError("its experts are on several ranks")
    return plan_for(body, rows, parameters[: len(parameters) // experts], KernelPlanner)


class KernelPlanner(Planner):
    """Plans what `ops.triton.body_run` can run."""

    def product(self, node: fx.Node) -> GroupedProduct | None:
        """The grouped product that computes `node`, with the activation and gating around it; or None."""
        node_ = self.without_views(node)
        if node_.target is aten.mul.Tensor:
            left, right = node_.args
            return self.gated(node, left, right)
        kind, inside = activation_of(node_)
        if kind == NONE and self.slice(inside) is not None:
            return None  # slices of one product stay views of it
        part = self.part(inside)
        return GroupedProduct(node, (part,), kind) if part is not None else None

    def gated(self, node: fx.Node, left: Any, right: Any) -> GroupedProduct | None:
        for one, other in ((left, right), (right, left)):
            if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
                return None
            kind, inside = activation_of(self.without_views(one))
            parts = self.part(inside), self.part(other)
            if kind != NONE and parts[0] is not None and parts[1] is not None and self.alike(parts[0], parts[1]):
                return GroupedProduct(node, (parts[0], parts[1]), kind)
        return None

    def alike(self, one: LinearSlice, other: LinearSlice) -> bool:
        """Whether one kernel can compute both: same rows, and weights of the same shape and strides."""
        same = (one.rows, one.transposed, one.stop - one.start, one.bias is None)
        strides = [self.values[part.weight].stride() for part in (one, other)]
        return (
            same == (other.rows, other.transposed, other.stop - other.start, other.bias is None)
            and strides[0] == strides[1]
        )

    def part(self, node: fx.Node) -> LinearSlice | None:
        """`node` as a product, or as a slice of one; None if it is neither."""
        node = self.without_views(node)
        cut = self.slice(node)
        if cut is None:
            whole = self.linear(node)
            return None if whole is None else replace(whole, rows=self.without_views(whole.rows))
        part = self.part(cut[0])
        return None if part is None else replace(part, start=part.start + cut[1], stop=part.start + cut[2])

    def slice(self, node: fx.Node) -> tuple[fx.Node, int, int] | None:
        """(whole, start, stop) if `node` is whole[..., start:stop]; else None."""
        arguments: Any = node.args
        if node.target is aten.slice.Tensor and len(node.args) == 4 and not node.kwargs:
            whole, dim, start, stop = arguments
            width = self.values[whole].shape[-1]
            last = dim in (-1, self.values[whole].dim() - 1)
            if not last or not isinstance(start, int) or not isinstance(stop, int) or start < 0 or stop < 0:
                return None
            return whole, start, min(stop, width)
        if node.target is operator.getitem and arguments[0].target in SPLITS:
            split, number = arguments
            parts, whole = self.values[split], split.args[0]
            if sum(part.shape[-1] for part in parts) != self.values[whole].shape[-1]:
                return None  # not split along the last dim
            start = sum(part.shape[-1] for part in parts[:number])
            return whole, start, start + parts[number].shape[-1]
        return None

    def without_views(self, node: fx.Node) -> fx.Node:
        """The node before all views through which each row remains one row of the same values."""
        while node.target in _SAME_ROWS and node in self.by_row:
            source: Any = node.args[0]
            shapes = [self.values[n].shape for n in (node, source)]
            if any(shape[0] != ROWS or shape[-1] * ROWS != shape.numel() for shape in shapes):
                break
            node = source
        return node

    def check_product(self, product: GroupedProduct) -> None:
        x = self.values[product.rows]
        if x.shape[0] != ROWS or x.shape.numel() != ROWS * x.shape[-1]:
            raise UnsupportedError(
                f"a product in an expert's body has several rows for a token: {tuple(x.shape[1:])}"
            )
        for part in product.slices:
            read = [self.values[n] for n in part.reads[1:]]
            if x.dtype not in DTYPES or any(value.dtype != x.dtype for value in read):
                names = ", ".join(str(value.dtype).removeprefix("torch.") for value in (x, *read))
                raise UnsupportedError(f"a product in an expert's body has operands in {names}")
            if part.bias is not None and read[1].stride(0) != 1:
                raise UnsupportedError("a bias in an expert's body is not a contiguous vector")

    def check_parameter(self, node: fx.Node, source: fx.Node) -> None:
        """An op on rows must be able to take an expert's parameter as one value for each row."""
        name = name_of(node)
        if node.target in NORMS:
            return
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            raise UnsupportedError(f"{name} in an expert's body reads a parameter of the expert")
        shape, dims = self.values[source].shape, self.values[node].dim()
        if len(shape) >= dims and shape[0] != 1:
            raise UnsupportedError(f"{name} in an expert's body joins rows and a parameter of shape {tuple(shape)}")


_ACTIVATIONS = {aten.relu.default: RELU, aten.silu.default: SILU, aten.gelu.default: GELU}


def activation_of(node: fx.Node) -> tuple[str, fx.Node]:
    """(name, input) of an activation; (NONE, node) for anything else."""
    name = next((name for target, name in _ACTIVATIONS.items() if node.target is target), None)
    if name is None:
        return NONE, node
    inside: Any = node.args[0]
    if name == GELU and node.kwargs.get("approximate", (*node.args, "none")[1]) == "tanh":
        name = GELU_TANH
    return name, inside
