"""A layer's computation once more, with a marker op in the place of its experts."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.capture.idioms.routing import routing as chosen_routing
from moeca_compile.capture.numerics import UntrustedError
from moeca_compile.capture.running.find import Found
from moeca_compile.capture.running.graph import Graph
from moeca_compile.capture.running.routing import Choices, Table
from moeca_compile.ops import markers  # noqa: F401  (defines the ops)
from moeca_compile.ops.exchange import factors

_CONSTANTS = 4096  # the numbers of a tensor that was made from a list: more of them would not be written down
_FIXED, _VARIABLE = torch.ops.moeca.experts_fixed_k.default, torch.ops.moeca.experts_variable_k.default


@dataclass(frozen=True)
class Replacement:
    """What stands for a layer.

    module: of (the call's tensors, the layer's tensors with these names); it returns what the layer returns
    body: of (rows, an expert's tensors)
    """

    module: fx.GraphModule
    names: tuple[str, ...]
    body: fx.GraphModule
    coupled: bool
    group: str = ""


def build(graph: Graph, found: Found, result: Any, coupled: bool, blocks: bool = False) -> Replacement:
    """The replacement.

    result: what the layer returned, with nodes of the graph for its tensors
    blocks: whether rows are sent to other ranks in blocks of one size
    """
    return _Builder(graph, found, result, coupled, blocks).replacement()


class _Builder:
    def __init__(self, graph: Graph, found: Found, result: Any, coupled: bool, blocks: bool) -> None:
        self.graph, self.found, self.result, self.coupled = graph, found, result, coupled
        self.exchange = (found.experts.group, found.experts.places if blocks else 0)
        self.made = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}

    def replacement(self) -> Replacement:
        found, graph = self.found, self.graph
        ends = _nodes(self.result)
        own = [node for tensors in found.experts.own for node, _ in tensors]
        weight = found.told.weight.node if found.told.weight else None
        read = [found.stream, found.told.routing.node, *own, *filter(None, (found.base, weight))]
        needed = set(graph.before(ends, [found.total])) | set(graph.before(read))
        if any(piece.out in needed for piece in found.experts.pieces):
            raise UntrustedError("outside of its experts it needs what single experts gave")
        names = tuple(graph.name_of[node] for node in graph.state if node in needed)
        for node in [*graph.arguments, *graph.state]:
            if node in needed or node in graph.arguments:
                self.copies[node] = self.made.placeholder(node.name)
        for node in graph.nodes:
            if node is found.total:
                self.copies[node] = self.experts()
            elif node in needed and node not in self.copies:
                self.copies[node] = self.copied(node)
        self.made.output(fx.map_arg(self.result, lambda each: self.copies[each]))
        return Replacement(
            fx.GraphModule({}, self.made), names, found.experts.body, self.coupled, found.experts.group
        )

    def copied(self, node: fx.Node) -> fx.Node:
        reason = self.graph.varies(node)
        missing = [each for each in node.all_input_nodes if each not in self.copies]
        if missing or reason:
            raise UntrustedError(
                f"outside of its experts it needs {reason or 'what single experts gave'} ({node.target})"
            )
        if node.op == "get_attr":
            return self.constant(self.graph.values[node])
        return self.made.node_copy(node, lambda each: self.copies[each])

    def constant(self, value: Tensor) -> fx.Node:
        if value.numel() > _CONSTANTS:
            raise UntrustedError("it makes a large tensor from numbers of the host")
        return self.made.call_function(
            torch.tensor, (value.tolist(),), {"dtype": value.dtype, "device": value.device}
        )

    # the experts

    def call(self, op: Any, *args: Any) -> fx.Node:
        return self.made.call_function(op, args)

    def table(self, table: Table) -> fx.Node:
        node, aten = self.copies[table.node], torch.ops.aten
        if table.places > 1:
            whole = self.call(aten.reshape.default, node, [-1, table.columns, table.places])
            return self.call(aten.sum.dim_IntList, whole, [2])
        if table.turned:
            rows = self.call(aten.t.default, self.call(aten.reshape.default, node, [table.columns, -1]))
        else:
            rows = self.call(aten.reshape.default, node, [-1, table.columns])
        return rows if table.each == 1 else self.call(aten.repeat_interleave.self_int, rows, table.each, 0)

    def experts(self) -> fx.Node:
        found, values = self.found, self.graph.values
        aten = torch.ops.aten
        tokens, count = len(values[found.stream].reshape(-1, values[found.stream].shape[-1])), len(found.experts.own)
        x = self.call(aten.reshape.default, self.copies[found.stream], [tokens, values[found.stream].shape[-1]])
        own = [[self.tensor(node, part) for node, part in tensors] for tensors in found.experts.own]
        entered = self.call(torch.ops.moeca.expert_rows.default, x)
        body = found.experts.body.graph
        places = dict(zip([each for each in body.nodes if each.op == "placeholder"], [entered, *own[0]], strict=True))
        for node in body.nodes:
            if node.op == "output":
                body_out = places[node.args[0]]
            elif node not in places:
                places[node] = self.made.node_copy(node, lambda each: places[each])
        params = [each for tensors in own for each in tensors]
        out = self.marker(x, body_out, params, count)
        total = values[found.total]
        out = self.call(aten.reshape.default, self.as_dtype(out, total.dtype), list(total.shape))
        if found.base is not None:
            base = self.call(
                aten.reshape.default, self.as_dtype(self.copies[found.base], total.dtype), list(total.shape)
            )
            out = self.call(aten.add.Tensor, base, out)
        return out

    def marker(self, x: fx.Node, body_out: fx.Node, params: list[fx.Node], count: int) -> fx.Node:
        told, aten = self.found.told, torch.ops.aten
        if isinstance(told.routing, Choices):
            return self.chosen(told.routing, x, body_out, params, count)
        routing = self.table(told.routing)
        weight = self.table(told.weight) if isinstance(told.weight, Table) else None
        if not told.by_ids:
            routed = self.call(aten.ne.Scalar, routing, 0)
            weight = weight if weight is not None else self.call(aten.to.dtype, routed, torch.float32)
            return self.call(_VARIABLE, x, routed, weight, body_out, params, count, 0, self.coupled, self.exchange[0])
        index = self.call(aten.to.dtype, routing, torch.int64)
        if weight is None:
            weight = self.call(aten.ones_like.default, self.call(aten.to.dtype, index, torch.float32))
        elif isinstance(told.weight, Table) and told.weight.columns != told.routing.columns:
            weight = self.call(aten.gather.default, weight, 1, index)
        return self.call(_FIXED, x, index, weight, body_out, params, count, *self.exchange)

    def chosen(self, choices: Choices, x: fx.Node, body_out: fx.Node, params: list[fx.Node], count: int) -> fx.Node:
        """Experts choose tokens."""
        index, values, held = self.copies[choices.node], self.graph.values, self.found.told.weight
        like = self.copies[held.node] if held else self.as_dtype(index, torch.float32)
        tokens = values[self.found.stream].shape[:-1].numel()
        both = self.call(chosen_routing, index, like, choices.reading, tokens, self.found.experts.count)
        routed, weight = self.call(operator.getitem, both, 0), self.call(operator.getitem, both, 1)
        weight = weight if held else self.as_dtype(routed, torch.float32)
        branches = values[choices.node].numel()
        return self.call(
            _VARIABLE, x, routed, weight, body_out, params, count, branches, self.coupled, self.exchange[0]
        )

    def tensor(self, node: fx.Node, part: int | None) -> fx.Node:
        return self.copies[node] if part is None else self.call(torch.ops.aten.select.int, self.copies[node], 0, part)

    def as_dtype(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return self.call(torch.ops.aten.to.dtype, node, dtype)


class Meaning(fx.Interpreter):
    """Runs a replacement; the marker is a plain loop over experts, each on the rows that have a weight for it.

    seen: what the last marker was given; rows: how many each expert got there, with a weight
    """

    def __init__(self, replacement: Replacement) -> None:
        super().__init__(replacement.module)
        self.body, self.factors = replacement.body, factors(replacement.group)
        self.seen: tuple[Any, ...] = ()
        self.rows = torch.zeros(0, dtype=torch.int64)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not _FIXED and target is not _VARIABLE:
            return super().call_function(target, args, kwargs)
        x, choice, weight, body_out, params, count = args[:6]
        self.seen, self.rows = (choice, weight), torch.zeros(count * len(self.factors), dtype=torch.int64)
        out = torch.zeros_like(body_out, dtype=torch.promote_types(body_out.dtype, torch.float32))
        each = len(params) // count
        for number in range(len(self.rows)):
            token, slot = (
                torch.where((choice == number) & (weight != 0))
                if target is _FIXED
                else ((choice[:, number] & (weight[:, number] != 0)).nonzero()[:, 0], number)
            )
            self.rows[number] = len(token)
            (rank, own), rows = divmod(number, count), x[token]
            made = self.body(rows * self.factors[rank], *params[own * each : (own + 1) * each]) * self.factors[rank]
            out.index_add_(0, token, made.to(out.dtype) * weight[token, slot, None].to(out.dtype))
        return out


def _nodes(value: Any) -> list[fx.Node]:
    """The nodes in a result, however it is nested."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [node for each in value for node in _nodes(each)]
    return [value] if isinstance(value, fx.Node) else []
