"""Plan an expert's body for kernels: which of its ops become grouped products, and which run as they are.

A body is a graph of ATen ops on (rows..., parameters of one expert...). On a device it runs once, on the rows of all
experts sorted by expert:

    act(x @ G.T) * (x @ U.T)   one gated product; G and U two weights, or halves of one in either order
    act(x @ W.T + b)           one product
    x @ W.T + b, x @ W         one product
    any other op on rows       as it is, on the sorted rows; parameters that it reads are taken row by row
    any op on parameters       for each expert; views cost nothing

So SwiGLU, and an MLP under GELU, are two kernels and nothing else. What cannot be said so raises UnsupportedError.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.ops.triton.activations import GELU, GELU_TANH, NONE, RELU, SILU
from moeca_compile.ops.triton.grouped import DTYPES
from moeca_compile.ops.triton.unsupported import UnsupportedError

aten = torch.ops.aten

NORMS = (aten.layer_norm.default, aten.rms_norm.default)
"""Ops that are taken apart where their weights are an expert's."""

_LINEAR, _MATMUL = aten.linear.default, (aten.matmul.default, aten.mm.default)
_VIEWS = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_ROWS = 1009
"""Rows that shapes are found with: a prime that no size of a model is likely to equal."""


@dataclass(frozen=True)
class Part:
    """Outputs start to stop of rows @ weight, plus bias."""

    rows: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    start: int
    stop: int

    def narrowed(self, start: int, stop: int) -> Part:
        return Part(self.rows, self.weight, self.bias, self.transposed, self.start + start, self.start + stop)


@dataclass(frozen=True)
class Product:
    """A grouped product with its activation; with two parts it is gated, the activated one first."""

    node: fx.Node
    parts: tuple[Part, ...]
    activation: str

    @property
    def rows(self) -> fx.Node:
        return self.parts[0].rows


@dataclass(frozen=True)
class Plain:
    """An op that runs on the sorted rows as it is."""

    node: fx.Node


@dataclass(frozen=True, eq=False)
class BodyPlan:
    """Steps in their order.

    Attributes:
        rows, parameters: the placeholders, in the order of the body's arguments.
        output: the node that is returned.
        inner: sizes of the rows of each value, without the number of rows.
        per_expert: nodes that are computed for each expert from its parameters, in order.
    """

    steps: tuple[Product | Plain, ...]
    rows: tuple[fx.Node, ...]
    parameters: tuple[fx.Node, ...]
    output: fx.Node
    inner: dict[fx.Node, tuple[int, ...]]
    per_expert: tuple[fx.Node, ...]

    @property
    def products_only(self) -> bool:
        """Whether nothing runs but kernels of ours."""
        return all(isinstance(step, Product) for step in self.steps)


def plan_body(body: fx.GraphModule, rows: Sequence[Tensor], parameters: Sequence[Tensor]) -> BodyPlan:
    """The plan of a body for rows and parameters (of one expert) of these shapes, strides and dtypes.

    Raises UnsupportedError, with the reason, where the kernels cannot run it.
    """
    return _Planner(body.graph, len(rows), _shapes(body, rows, parameters)).plan()


def _shapes(body: fx.GraphModule, rows: Sequence[Tensor], parameters: Sequence[Tensor]) -> dict[fx.Node, Any]:
    """Each node's value without data: of _ROWS rows, and of the first expert's parameters."""
    values = [torch.empty(_ROWS, *row.shape[1:], dtype=row.dtype, device="meta") for row in rows]
    values += [torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta") for p in parameters]
    recorder = _Recorder(body)
    try:
        recorder.run(*values)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UnsupportedError(f"the shapes in an expert's body are not known: {first}") from error
    return recorder.values


class _Recorder(fx.Interpreter):
    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__(body, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


@dataclass
class _Planner:
    """Goes from the output to what it needs, so that what a product takes in is never computed besides."""

    graph: fx.Graph
    row_inputs: int
    values: dict[fx.Node, Any]
    steps: list[Product | Plain] = field(default_factory=list)
    planned: set[fx.Node] = field(default_factory=set)

    def plan(self) -> BodyPlan:
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.rows = tuple(inputs[: self.row_inputs])
        self.by_row = self._depend_on(self.rows)
        (output,) = next(iter(reversed(self.graph.nodes))).all_input_nodes
        self.need(output)
        inner = {node: tuple(value.shape[1:]) for node, value in self.values.items() if isinstance(value, Tensor)}
        if len(inner[output]) != 1:
            raise UnsupportedError(f"an expert's output has the shape (rows, *{inner[output]})")
        fixed = tuple(n for n in self.graph.nodes if n.op == "call_function" and n in self.planned - self.by_row)
        return BodyPlan(tuple(self.steps), self.rows, tuple(inputs[self.row_inputs :]), output, inner, fixed)

    def _depend_on(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        found = set(nodes)
        for node in self.graph.nodes:
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def need(self, node: fx.Node) -> None:
        """Plan what gives `node`, and before it all that it reads."""
        if node in self.planned:
            return
        self.planned.add(node)
        if node.op == "placeholder":
            return
        product = self.product(node) if node in self.by_row else None
        if product is None:
            self.check(node)
            read = node.all_input_nodes
        else:
            self.check_product(product)
            read = [n for part in product.parts for n in (part.rows, part.weight, part.bias) if n is not None]
        for source in read:
            self.need(source)
        if node in self.by_row:
            self.steps.append(product or Plain(node))

    # --- products -------------------------------------------------------------------------------------------

    def product(self, node: fx.Node) -> Product | None:
        """The grouped product that gives `node`, with as much around it as one kernel computes."""
        node_ = self.without_views(node)
        if node_.target is aten.mul.Tensor:
            left, right = node_.args
            return self.gated(node, left, right)
        kind, inside = activation_of(node_)
        if kind == NONE and self.slice(inside) is not None:
            return None  # the slices of one product are views of it
        part = self.part(inside)
        return Product(node, (part,), kind) if part is not None else None

    def gated(self, node: fx.Node, left: Any, right: Any) -> Product | None:
        for one, other in ((left, right), (right, left)):
            if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
                return None
            kind, inside = activation_of(self.without_views(one))
            parts = self.part(inside), self.part(other)
            if kind != NONE and parts[0] is not None and parts[1] is not None and self.alike(parts[0], parts[1]):
                return Product(node, (parts[0], parts[1]), kind)
        return None

    def alike(self, one: Part, other: Part) -> bool:
        """Whether one kernel can read both: the same rows, and weights that lie alike."""
        same = (one.rows, one.transposed, one.stop - one.start, one.bias is None)
        lie = [self.values[part.weight].stride() for part in (one, other)]
        return (
            same == (other.rows, other.transposed, other.stop - other.start, other.bias is None) and lie[0] == lie[1]
        )

    def part(self, node: fx.Node) -> Part | None:
        """The product that `node` is, or is a slice of."""
        node = self.without_views(node)
        cut = self.slice(node)
        if cut is not None:
            whole = self.part(cut[0])
            return whole.narrowed(cut[1], cut[2]) if whole is not None else None
        rows: Any = None
        weight: Any = None
        bias: Any = None
        if node.kwargs:
            return None
        if node.target is _LINEAR:
            rows, weight, bias = (*node.args, None)[:3]
        elif node.target in _MATMUL:
            rows, weight = node.args
        elif node.target is aten.addmm.default:
            bias, rows, weight = node.args
        else:
            return None
        if rows not in self.by_row or weight in self.by_row or bias in self.by_row or self.values[weight].dim() != 2:
            return None
        transposed = node.target is not _LINEAR
        outputs = self.values[weight].shape[1 if transposed else 0]
        return Part(self.without_views(rows), weight, bias, transposed, 0, outputs)

    def slice(self, node: fx.Node) -> tuple[fx.Node, int, int] | None:
        """(whole, start, stop) where `node` is a range of the last dim of another."""
        arguments: Any = node.args
        if node.target is aten.slice.Tensor and len(node.args) == 4 and not node.kwargs:
            whole, dim, start, stop = arguments
            width = self.values[whole].shape[-1]
            last = dim in (-1, self.values[whole].dim() - 1)
            if not last or not isinstance(start, int) or not isinstance(stop, int) or start < 0 or stop < 0:
                return None
            return whole, start, min(stop, width)
        if node.target is operator.getitem and arguments[0].target in _SPLITS:
            split, number = arguments
            parts, whole = self.values[split], split.args[0]
            if sum(part.shape[-1] for part in parts) != self.values[whole].shape[-1]:
                return None  # not split along the last dim
            start = sum(part.shape[-1] for part in parts[:number])
            return whole, start, start + parts[number].shape[-1]
        return None

    def without_views(self, node: fx.Node) -> fx.Node:
        """Where `node` comes from, past views that leave every row one row of the same values."""
        while node.target in _VIEWS and node in self.by_row:
            source: Any = node.args[0]
            shapes = [self.values[n].shape for n in (node, source)]
            if any(shape[0] != _ROWS or shape[-1] * _ROWS != shape.numel() for shape in shapes):
                break
            node = source
        return node

    # --- what is not possible -------------------------------------------------------------------------------

    def check_product(self, product: Product) -> None:
        x = self.values[product.rows]
        if x.shape[0] != _ROWS or x.shape.numel() != _ROWS * x.shape[-1]:
            raise UnsupportedError(
                f"a product in an expert's body has several rows for a token: {tuple(x.shape[1:])}"
            )
        for part in product.parts:
            read = [self.values[n] for n in (part.weight, part.bias) if n is not None]
            if x.dtype not in DTYPES or any(value.dtype != x.dtype for value in read):
                names = ", ".join(str(value.dtype).removeprefix("torch.") for value in (x, *read))
                raise UnsupportedError(f"a product in an expert's body has operands in {names}")
            if part.bias is not None and (read[1].dim() != 1 or read[1].stride(0) != 1):
                raise UnsupportedError("a bias in an expert's body is no contiguous vector")

    def check(self, node: fx.Node) -> None:
        """Raises where an op cannot run as it is, on the rows of all experts at once."""
        name = getattr(node.target, "__name__", str(node.target))
        if node.op != "call_function":
            raise UnsupportedError(f"an expert's body has a node {node.op} {name}")
        tags = getattr(node.target, "tags", ())
        if {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(tags):
            raise UnsupportedError(f"the shape of {name} in an expert's body depends on data")
        value = self.values[node]
        if node not in self.by_row:
            if not node.all_input_nodes:
                raise UnsupportedError(f"{name} in an expert's body reads neither rows nor parameters")
            return
        shape = value.shape if isinstance(value, Tensor) else value[0].shape
        if not shape or shape[0] != _ROWS:
            raise UnsupportedError(f"{name} in an expert's body gives no row for each row: {tuple(shape)}")
        for source in node.all_input_nodes:
            if source not in self.by_row:
                self.check_parameter(node, source, name)

    def check_parameter(self, node: fx.Node, source: fx.Node, name: str) -> None:
        """An expert's parameter in an op on rows has to be one value for each row."""
        if node.target in NORMS:
            return
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            raise UnsupportedError(f"{name} in an expert's body reads a parameter of the expert")
        shape, dims = self.values[source].shape, self.values[node].dim()
        if len(shape) >= dims and shape[0] != 1:
            raise UnsupportedError(f"{name} in an expert's body joins rows and a parameter of shape {tuple(shape)}")


_ACTIVATIONS = {aten.relu.default: RELU, aten.silu.default: SILU, aten.gelu.default: GELU}


def activation_of(node: fx.Node) -> tuple[str, fx.Node]:
    """(name, what it is applied to) of an activation; (NONE, node) of anything else."""
    name = next((name for target, name in _ACTIVATIONS.items() if node.target is target), None)
    if name is None:
        return NONE, node
    inside: Any = node.args[0]
    if name == GELU and node.kwargs.get("approximate", (*node.args, "none")[1]) == "tanh":
        name = GELU_TANH
    return name, inside
