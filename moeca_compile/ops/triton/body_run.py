"""Run a planned body by kernels, on the branches of all experts, sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.ops.body_plan import BodyPlan, GroupedProduct, LinearSlice
from moeca_compile.ops.body_run import Values, by_expert, call, parameter_values, run_steps
from moeca_compile.ops.triton.compaction import SortedBranches
from moeca_compile.ops.triton.grouped import Weight, grouped_product
from moeca_compile.ops.triton.operands import Operand, addresses, memoized, operand
from moeca_compile.ops.triton.rows import by_place

aten = torch.ops.aten


def run_body(
    plan: BodyPlan,
    rows: Sequence[Tensor],
    branches: SortedBranches,
    parameters: Sequence[Tensor],
    into: Tensor | None = None,
) -> Tensor:
    """Outputs (M, width) of all branches by position, or those written to `into` by place (ops.triton.compaction).

    Args:
        plan: the body's plan for these shapes (ops.triton.body_plan).
        rows: inputs of the experts, each (T, ...).
        branches: which of them run.
        parameters: expert-major, E * P tensors.
        into: (M, width) contiguous, written by place; None for a new tensor by position.

    Rows of positions that do not run are undefined. Raises UnsupportedError, before anything runs, if the
    experts' parameters differ in shape, strides or dtype.
    """
    values = _ByPosition(dict(zip(plan.rows, rows, strict=True)), branches)
    weights = weights_of(plan, parameters, branches.experts)
    out = run_steps(plan, values, _Kernels(plan, branches, parameters, weights, values.given, into))
    if into is None:
        return out.contiguous()
    if not (plan.steps and isinstance(plan.steps[-1], GroupedProduct)):
        by_place(out, branches, into)
    return into


def weights_of(plan: BodyPlan, parameters: Sequence[Tensor], experts: int) -> dict[LinearSlice, Weight]:
    """The weights of all products of the plan, read at the parameters' addresses. Raises UnsupportedError."""
    slices = [each for step in plan.steps if isinstance(step, GroupedProduct) for each in step.slices]

    def build() -> tuple[tuple[Operand, ...], bool]:
        values = parameter_values(plan, by_expert(parameters, experts))
        own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        tensors = [_narrowed(each, node, values) for each in slices for node in each.reads[1:]]
        lasts = all(one.untyped_storage().data_ptr() in own for each in tensors for one in each)
        return tuple(operand(each) for each in tensors), lasts

    operands = iter(memoized((plan, addresses(parameters)), build))
    return {s: Weight(next(operands), next(operands) if s.bias else None, s.transposed) for s in slices}


def _narrowed(linear: LinearSlice, node: fx.Node, values: dict[fx.Node, list[Tensor]]) -> list[Tensor]:
    """Each expert's weight or bias, narrowed to the outputs of the slice."""
    dim = 1 if linear.transposed and node is linear.weight else 0
    return [value.narrow(dim, linear.start, linear.stop - linear.start) for value in values[node]]


class _ByPosition(Values):
    """Values by position. Inputs of the body are gathered when first read."""

    def __init__(self, given: dict[fx.Node, Tensor], branches: SortedBranches) -> None:
        super().__init__()
        self.given, self.branches = given, branches

    def __missing__(self, node: fx.Node) -> Tensor:
        self[node] = self.given[node].index_select(0, self.branches.rows())
        gathered: Tensor = self[node]
        return gathered


@dataclass
class _Kernels:
    """Runs products by `grouped_product`, and other ops with each row's parameters gathered."""

    plan: BodyPlan
    branches: SortedBranches
    parameters: Sequence[Tensor]
    weights: dict[LinearSlice, Weight]
    given: dict[fx.Node, Tensor]
    into: Tensor | None
    of_experts: dict[fx.Node, list[Tensor]] | None = None

    def product(self, step: GroupedProduct, values: Values) -> Tensor:
        gather = step.rows in self.given and self.given[step.rows].dim() == 2
        out = grouped_product(
            self.given[step.rows] if gather else values[step.rows].flatten(1),
            self.branches,
            tuple(self.weights[each] for each in step.slices),
            step.activation,
            gather,
            self.into if step.node is self.plan.output else None,
        )
        return out.view(-1, *self.plan.inner[step.node])

    def row_op(self, node: fx.Node, values: Values) -> Tensor:
        dims = len(self.plan.inner[node]) + 1

        def value_of(source: fx.Node) -> Any:
            of_expert = source in self.plan.parameters or source in self.plan.per_expert
            return self._by_row(source, dims) if of_expert else values[source]

        out: Tensor = call(node, value_of, _NORMS.get(node.target, node.target))
        return out

    def _by_row(self, node: fx.Node, dims: int) -> Tensor:
        """For each position the parameter of its expert: (M, 1, ..., *shape) with `dims` dims."""
        if self.of_experts is None:
            self.of_experts = parameter_values(self.plan, by_expert(self.parameters, self.branches.experts))
        value = torch.stack(self.of_experts[node]).index_select(0, self.branches.expert())
        if value.dim() > dims:  # its own first size is 1
            return value.squeeze(1)
        return value.reshape(len(value), *[1] * (dims - value.dim()), *value.shape[1:])


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """layer_norm with a weight and a bias for each row, rounded once like the op itself."""
    return _scaled(F.layer_norm(_widened(x), shape, eps=eps), weight, bias, x.dtype)


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """rms_norm with a weight for each row. The default of eps depends on the dtype of x, so x is not widened then."""
    return _scaled(F.rms_norm(x if eps is None else _widened(x), shape, eps=eps), weight, None, x.dtype)


_NORMS: dict[object, object] = {aten.layer_norm.default: _layer_norm, aten.rms_norm.default: _rms_norm}


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).to(dtype)
