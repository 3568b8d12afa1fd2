"""Plan an expert's body so that it runs once for all experts, on rows sorted by expert.

A body is a graph of ATen ops on (rows..., parameters of one expert...). Its plan has a step for each op on rows:

    x @ W.T + b, x @ W + b, x @ W    a grouped product: the rows of each expert times its own weight
    any other op on rows             the op itself on all rows; a provider supplies the experts' parameters

Ops on parameters alone run first, once for each expert. `ops.body_run` runs the plan on every device. A device whose
kernels compute more at once has its own planner (`ops.triton.body_plan`: products with activation and gating). A body
that cannot be planned raises UnsupportedError and runs expert by expert.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from moeca_compile.ops import bodies
from moeca_compile.ops.unsupported import UnsupportedError

aten = torch.ops.aten

ROWS = 1009
"""Number of rows used to infer shapes: a prime that is unlikely to equal any size of a model."""

NONE = "none"
"""The name for no activation."""


@dataclass(frozen=True)
class LinearSlice:
    """Columns start to stop of rows @ weight.T + bias, or of rows @ weight + bias if `transposed`."""

    rows: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    start: int
    stop: int

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return tuple(node for node in (self.rows, self.weight, self.bias) if node is not None)


@dataclass(frozen=True)
class GroupedProduct:
    """A step: activation(rows @ weight), each expert's rows with its own weight.

    With two slices it is gated: activation(first) * second.
    """

    node: fx.Node
    slices: tuple[LinearSlice, ...]
    activation: str = NONE

    @property
    def rows(self) -> fx.Node:
        return self.slices[0].rows

    @property
    def reads(self) -> list[fx.Node]:
        return [node for each in self.slices for node in each.reads]


@dataclass(frozen=True)
class RowOp:
    """A step: an op that runs unchanged on the sorted rows."""

    node: fx.Node
    reads_parameters: bool

    @property
    def reads(self) -> list[fx.Node]:
        return self.node.all_input_nodes


@dataclass(frozen=True, eq=False)
class BodyPlan:
    """How to run a body for all experts.

    Attributes:
        steps: in the order in which they run.
        rows, parameters: the placeholders, in the order of the body's arguments.
        output: the node that is returned.
        inner: the shape of each value without its first dim, the rows.
        per_expert: nodes that are computed once for each expert from its parameters, in order.
        last_read: for each step, the values that no later step reads, so that their memory can be freed.
    """

    steps: tuple[GroupedProduct | RowOp, ...]
    rows: tuple[fx.Node, ...]
    parameters: tuple[fx.Node, ...]
    output: fx.Node
    inner: dict[fx.Node, tuple[int, ...]]
    per_expert: tuple[fx.Node, ...]
    last_read: tuple[tuple[fx.Node, ...], ...]


_plans: dict[Hashable, BodyPlan | str] = {}


def plan_for(
    body: str, rows: Sequence[Tensor], parameters: Sequence[Tensor], planner: type[Planner] | None = None
) -> BodyPlan:
    """The plan of a registered body, cached for rows and parameters of these shapes, strides and dtypes.

    Args:
        body: its key (ops.bodies).
        rows: its inputs, each (R, ...).
        parameters: those of one expert.
        planner: the device's planner; None for the one that suits every device.

    Raises UnsupportedError, with the reason, if the body cannot be planned.
    """
    planner = planner or Planner
    key = (planner, body, tuple((row.shape[1:], row.dtype) for row in rows), layout(parameters))
    if key not in _plans:
        try:
            _plans[key] = planner.of(bodies.graph(body), rows, parameters).plan()
        except UnsupportedError as reason:
            _plans[key] = str(reason)
    plan = _plans[key]
    if isinstance(plan, str):
        raise UnsupportedError(plan)
    return plan


def layout(parameters: Sequence[Tensor]) -> Hashable:
    """What a plan depends on: shape, strides and dtype of each of an expert's parameters."""
    return tuple((p.shape, p.stride(), p.dtype) for p in parameters)


def flops_per_row(body: str, rows: Sequence[Tensor], parameters: Sequence[Tensor]) -> int:
    """FLOPs of a body for one row (a multiply-add counts two), given one expert's parameters.

    Raises UnsupportedError if the body cannot run on meta tensors.
    """
    with FlopCounterMode(display=False) as counter:
        _values(bodies.graph(body), rows, parameters)
    return counter.get_total_flops() // ROWS


def _values(body: fx.GraphModule, rows: Sequence[Tensor], parameters: Sequence[Tensor]) -> dict[fx.Node, Any]:
    """Each node's value as a meta tensor, for ROWS rows and one expert's parameters."""
    given = [torch.empty(ROWS, *row.shape[1:], dtype=row.dtype, device="meta") for row in rows]
    given += [torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta") for p in parameters]
    recorder = _Recorder(body)
    try:
        recorder.run(*given)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UnsupportedError(f"the shapes in an expert's body cannot be inferred: {first}") from error
    return recorder.values


class _Recorder(fx.Interpreter):
    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__(body, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


@dataclass
class Planner:
    """Plans from the output backwards, so that ops that a grouped product absorbs get no step of their own.

    A planner for a device overrides `product`, `check_product` and `check_parameter`.
    """

    graph: fx.Graph
    row_inputs: int
    values: dict[fx.Node, Any]
    steps: list[GroupedProduct | RowOp] = field(default_factory=list)
    planned: set[fx.Node] = field(default_factory=set)

    @classmethod
    def of(cls, body: fx.GraphModule, rows: Sequence[Tensor], parameters: Sequence[Tensor]) -> Planner:
        return cls(body.graph, len(rows), _values(body, rows, parameters))

    def plan(self) -> BodyPlan:
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        rows, parameters = tuple(inputs[: self.row_inputs]), tuple(inputs[self.row_inputs :])
        self.by_row = self._depend_on(rows)
        (output,) = next(iter(reversed(self.graph.nodes))).all_input_nodes
        self.need(output)
        inner = {node: tuple(value.shape[1:]) for node, value in self.values.items() if isinstance(value, Tensor)}
        if output not in self.by_row or len(inner[output]) != 1:
            raise UnsupportedError(f"an expert's output has the shape (rows, *{inner[output]}), not (rows, width)")
        fixed = tuple(n for n in self.graph.nodes if n.op == "call_function" and n in self.planned - self.by_row)
        last = {node: number for number, step in enumerate(self.steps) for node in step.reads if node in self.by_row}
        last.pop(output, None)
        last_read = tuple(tuple(n for n, at in last.items() if at == number) for number in range(len(self.steps)))
        return BodyPlan(tuple(self.steps), rows, parameters, output, inner, fixed, last_read)

    def _depend_on(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        found = set(nodes)
        for node in self.graph.nodes:
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def need(self, node: fx.Node) -> None:
        """Plan the step that computes `node`, after those that it reads."""
        if node in self.planned:
            return
        self.planned.add(node)
        if node.op == "placeholder":
            return
        self.check(node)
        step = self.step(node) if node in self.by_row else None
        for source in step.reads if step is not None else node.all_input_nodes:
            self.need(source)
        if step is not None:
            self.steps.append(step)

    def step(self, node: fx.Node) -> GroupedProduct | RowOp:
        """The step for an op on rows. Raises UnsupportedError."""
        product = self.product(node)
        if product is not None:
            self.check_product(product)
            return product
        value = self.values[node]
        shape = value.shape if isinstance(value, Tensor) else value[0].shape
        if not shape or shape[0] != ROWS:
            raise UnsupportedError(f"{name_of(node)} in an expert's body has no row for each row: {tuple(shape)}")
        parameters = [source for source in node.all_input_nodes if source not in self.by_row]
        for source in parameters:
            self.check_parameter(node, source)
        return RowOp(node, bool(parameters))

    def product(self, node: fx.Node) -> GroupedProduct | None:
        """The grouped product that computes `node`, with whatever the device computes in the same kernel; or None."""
        whole = self.linear(node)
        return GroupedProduct(node, (whole,)) if whole is not None else None

    def linear(self, node: fx.Node) -> LinearSlice | None:
        """`node` as a product of rows with an expert's weight; None if it is not one."""
        rows: Any = None
        weight: Any = None
        bias: Any = None
        if node.kwargs:
            return None
        if node.target is aten.linear.default:
            rows, weight, bias = (*node.args, None)[:3]
        elif node.target in (aten.matmul.default, aten.mm.default):
            rows, weight = node.args
        elif node.target is aten.addmm.default:
            bias, rows, weight = node.args
        if rows not in self.by_row or weight in self.by_row or bias in self.by_row:
            return None
        x, w = self.values[rows], self.values[weight]
        transposed = node.target is not aten.linear.default
        outputs = self.values[node].shape[-1]
        per_output = bias is None or self.values[bias].shape == (outputs,)
        if x.dim() < 2 or x.shape[0] != ROWS or w.dim() != 2 or not per_output:
            return None
        return LinearSlice(rows, weight, bias, transposed, 0, outputs)

    def check(self, node: fx.Node) -> None:
        """Raise UnsupportedError unless `node` is an op on rows or parameters with a static shape."""
        name = name_of(node)
        if node.op != "call_function":
            raise UnsupportedError(f"an expert's body has a node {node.op} {name}")
        if not node.all_input_nodes:
            raise UnsupportedError(f"{name} in an expert's body reads neither rows nor parameters")
        tags = getattr(node.target, "tags", ())
        if {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(tags):
            raise UnsupportedError(f"the shape of {name} in an expert's body depends on data")

    def check_product(self, product: GroupedProduct) -> None:
        """Raise UnsupportedError if the device cannot run a product."""

    def check_parameter(self, node: fx.Node, source: fx.Node) -> None:
        """Raise UnsupportedError if the device cannot run an op on rows that reads this parameter of an expert."""
        if not isinstance(self.values[node], Tensor):
            raise UnsupportedError(f"{name_of(node)} in an expert's body reads a parameter and has several results")


def name_of(node: fx.Node) -> str:
    """The name of a node's op, for messages."""
    return getattr(node.target, "__name__", str(node.target))
