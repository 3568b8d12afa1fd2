"""Run a planned body on the sorted branches of all experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.ops.triton.body_plan import NORMS, BodyPlan, Part, Plain, Product
from moeca_compile.ops.triton.compaction import Branches
from moeca_compile.ops.triton.grouped import Weight, grouped_product
from moeca_compile.ops.triton.operands import Operand, kept, operand, where_they_are
from moeca_compile.ops.triton.rows import by_place

aten = torch.ops.aten


def run_body(
    plan: BodyPlan, rows: Sequence[Tensor], branches: Branches, parameters: Sequence[Tensor], scatter: bool
) -> Tensor:
    """Outputs (M, width) of all branches, by place where `scatter`, else by position.

    Args:
        plan: of the body, for these shapes.
        rows: what enters the experts, each (T, ...).
        parameters: expert-major, E * P tensors.

    Rows of places and positions that do not run have no meaning. Raises UnsupportedError, before anything has run,
    where the parameters do not lie as the plan assumes.
    """
    run = _Run(plan, rows, branches, parameters)
    for step in plan.steps:
        run.product(step, scatter) if isinstance(step, Product) else run.plain(step)
    out: Tensor = run.value(plan.output)
    if scatter and not (plan.steps and isinstance(plan.steps[-1], Product)):
        return by_place(out, branches)
    return out.contiguous()


def weights_of(plan: BodyPlan, parameters: Sequence[Tensor], experts: int) -> dict[Part, Weight]:
    """The weights of all the plan's products, wherever the parameters are. Raises UnsupportedError."""
    parts = [part for step in plan.steps if isinstance(step, Product) for part in step.parts]

    def build() -> tuple[tuple[Operand, ...], bool]:
        values = parameter_values(plan, parameters, experts)
        own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        tensors = [_narrowed(part, node, values) for part in parts for node in (part.weight, part.bias) if node]
        lasts = all(one.untyped_storage().data_ptr() in own for each in tensors for one in each)
        return tuple(operand(each) for each in tensors), lasts

    operands = iter(kept((plan, where_they_are(parameters)), build))
    return {p: Weight(next(operands), next(operands) if p.bias else None, p.transposed) for p in parts}


def _narrowed(part: Part, node: fx.Node, values: dict[fx.Node, list[Tensor]]) -> list[Tensor]:
    """Each expert's weight or bias of the part's outputs."""
    dim = 1 if part.transposed and node is part.weight else 0
    return [value.narrow(dim, part.start, part.stop - part.start) for value in values[node]]


def parameter_values(plan: BodyPlan, parameters: Sequence[Tensor], experts: int) -> dict[fx.Node, list[Tensor]]:
    """Every parameter and what is computed from parameters alone: one tensor an expert."""
    each = len(parameters) // experts
    values = {node: list(parameters[i::each]) for i, node in enumerate(plan.parameters)}
    for node in plan.per_expert:
        values[node] = [_call(node, {n: each[e] for n, each in values.items()}.__getitem__) for e in range(experts)]
    return values


def _call(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    target: Any = node.target
    return target(*args, **kwargs)


class _Run:
    """Values of the rows, by position, as far as they are known."""

    def __init__(
        self, plan: BodyPlan, rows: Sequence[Tensor], branches: Branches, parameters: Sequence[Tensor]
    ) -> None:
        self.plan, self.branches, self.parameters = plan, branches, parameters
        self.given = dict(zip(plan.rows, rows, strict=True))
        self.weights = weights_of(plan, parameters, branches.experts)
        self.values: dict[fx.Node, Any] = {}
        self.of_experts: dict[fx.Node, list[Tensor]] | None = None

    def product(self, step: Product, scatter: bool) -> None:
        gather = step.rows in self.given and self.given[step.rows].dim() == 2
        x = self.given[step.rows] if gather else self.value(step.rows).flatten(1)
        out = grouped_product(
            x,
            self.branches,
            tuple(self.weights[part] for part in step.parts),
            step.activation,
            gather,
            scatter and step.node is self.plan.output,
        )
        self.values[step.node] = out.view(-1, *self.plan.inner[step.node])

    def plain(self, step: Plain) -> None:
        node = step.node
        if node.target in NORMS and any(self._is_parameter(source) for source in node.all_input_nodes):
            self.values[node] = self._norm(node)
            return
        dims = len(self.plan.inner.get(node, ())) + 1
        self.values[node] = _call(
            node, lambda source: self._by_row(source, dims) if self._is_parameter(source) else self.value(source)
        )

    def value(self, node: fx.Node) -> Any:
        """A value of the rows, by position; the rows that enter are gathered when first asked for."""
        if node not in self.values:
            self.values[node] = self.given[node].index_select(0, self.branches.rows())
        return self.values[node]

    def _is_parameter(self, node: fx.Node) -> bool:
        return node in self.plan.parameters or node in self.plan.per_expert

    def _by_row(self, node: fx.Node, dims: int) -> Tensor:
        """An expert's parameter for each position: (M, 1, ..., *shape) of `dims` dims."""
        if self.of_experts is None:
            self.of_experts = parameter_values(self.plan, self.parameters, self.branches.experts)
        value = torch.stack(self.of_experts[node]).index_select(0, self.branches.expert())
        if value.dim() > dims:  # its own first size is 1
            return value.squeeze(1)
        return value.reshape(len(value), *[1] * (dims - value.dim()), *value.shape[1:])

    def _norm(self, node: fx.Node) -> Tensor:
        """A norm whose weights are those of each row's expert; rounded once, like the op itself."""
        arguments: Any = node.args
        x, shape, *rest = arguments
        rows = self.value(x)
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        given: list[Any] = [self._by_row(n, rows.dim()) if isinstance(n, fx.Node) else n for n in rest]
        bias = None
        if node.target is aten.layer_norm.default:
            weight, bias, eps = (given + [None, None, 1e-5][len(given) :])[:3]
            wide = F.layer_norm(wide, shape, eps=eps)
        else:
            weight, eps = given + [None, None][len(given) :]
            # Which epsilon stands for none depends on the dtype of what the op is given.
            wide = F.rms_norm(rows if eps is None else wide, shape, eps=eps)
        wide = wide if weight is None else wide * weight
        return (wide if bias is None else wide + bias).to(rows.dtype)
