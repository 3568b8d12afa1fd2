"""Match mixture-of-experts layers from their markers: router choice, expert body, shared experts, probe."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from math import prod

import torch
from torch import fx

from moeca_compile.ops import bodies
from moeca_compile.ops.exchange import count_of
from moeca_compile.ops.markers import ENTRY, MARKERS, exchange_of
from moeca_compile.passes.analysis.axis import Layout
from moeca_compile.passes.analysis.costs import node_flops
from moeca_compile.passes.analysis.graph import ancestors, between, module_path, shape_of
from moeca_compile.passes.analysis.token_axis import Layouts, token_layouts
from moeca_compile.passes.match.attention import work_between
from moeca_compile.passes.match.regions import Attention, ExpertBody, Experts, FeedForward, Residual, Skipped
from moeca_compile.passes.match.residuals import residual_around
from moeca_compile.passes.rewrite.rows import _RESIZED

TOPK = torch.ops.aten.topk.default
MARKER = torch.ops.moeca.experts_fixed_k.default


def expert_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Every MoE layer's marker, in graph order."""
    return [node for node in graph.nodes if node.target in MARKERS]


def match_experts(
    marker: fx.Node, body: ExpertBody, layouts: Layouts, attentions: tuple[Attention, ...]
) -> Experts | Skipped:
    """The MoE layer of `marker`, or why it is skipped."""
    rows, choice, weight = marker.args[:3]
    assert isinstance(rows, fx.Node) and isinstance(choice, fx.Node) and isinstance(weight, fx.Node)
    by_token = marker.target is MARKER
    name = module_path(marker)
    residual = residual_around(marker)
    reason = None
    if residual is None:
        reason = "its output reaches no residual addition with the stream that it reads"
    elif residual.output not in layouts or not _by_row((rows, marker), layouts):
        reason = "its input is not computed token by token from the residual stream"
    elif by_token and not _by_row((choice, weight), layouts):
        reason = "its router does not choose token by token from the residual stream"
    elif by_token and not any(node.target is TOPK for node in ancestors([choice], stop=(residual.stream,))):
        reason = "its expert ids come from no top-k"
    if reason is not None or residual is None:
        return Skipped("experts", name, reason or "", marker)
    shared = _shared_experts(marker, residual, layouts)
    return Experts(name, residual, marker, choice, weight, body, shared, _probe(residual, attentions))


def _by_row(nodes: Iterable[fx.Node], layouts: Layouts) -> bool:
    """Whether all of these values have one row for each token of each sample."""
    return all(node in layouts and layouts[node].merged for node in nodes)


def _probe(residual: Residual, attentions: tuple[Attention, ...]) -> Attention | None:
    """The attention right before the router: no matrix product is between its residual addition and the stream."""
    stream = [residual.stream]
    adds = ((a, a.residual.add) for a in reversed(attentions))
    last = next((a for a, add in adds if add in ancestors(stream, since=add)), None)
    return last if last is not None and not work_between(last.residual.add, residual.stream) else None


def _shared_experts(marker: fx.Node, residual: Residual, layouts: Layouts) -> tuple[FeedForward, ...]:
    """Row-wise networks beside the routed experts: their outputs join the path from the marker to the output.

    A factor of a token, such as weights of 1 that are multiplied outside of the marker, has another size.
    """
    path, whole = between(marker, [residual.output]) | {marker}, prod(shape_of(marker))
    joining = {arg for node in path - {marker} for arg in node.all_input_nodes if arg not in path}
    return tuple(
        FeedForward(f"{module_path(node)}", residual.stream, node)
        for node in sorted(joining)
        if node in layouts and prod(shape_of(node)) == whole and work_between(residual.stream, node)
    )


def body_nodes(marker: fx.Node) -> set[fx.Node]:
    """The nodes of expert 0's traced body, with its entries and parameters (which may be slices of packed ones)."""
    output, own = marker.args[3], own_parameters(marker)
    assert isinstance(output, fx.Node)
    entries = output.graph.find_nodes(op="call_function", target=ENTRY)
    return ancestors([output], stop=[*entries, *own])


def own_parameters(marker: fx.Node) -> list[fx.Node]:
    """The parameters of expert 0, in order: inputs of the graph or nodes such as `packed[0]`."""
    params, experts = marker.args[4:6]
    assert isinstance(params, (list, tuple)) and isinstance(experts, int)
    return list(params[: len(params) // experts])


def expert_body(marker: fx.Node) -> ExpertBody:
    """Copy the traced body of expert 0 into a function of (rows..., parameters...) and register it."""
    output, params, experts = marker.args[3:6]
    assert isinstance(output, fx.Node) and isinstance(params, (list, tuple)) and isinstance(experts, int)
    own = own_parameters(marker)
    inside = body_nodes(marker)
    entries = tuple(sorted(n for n in inside if n.target is ENTRY))
    body = _extract(output, entries, own, inside)
    rows = tuple(entry.args[0] for entry in entries)
    flops = sum(node_flops(node) for node in inside) // shape_of(entries[0])[0]
    group, places = exchange_of(marker.target, marker.args)
    key, experts = bodies.register(body, group, places), experts * count_of(group)
    return ExpertBody(key, rows, tuple(params), experts, flops, _branches(marker))  # type: ignore[arg-type]


def _branches(marker: fx.Node) -> int:
    """Branches in a call; 0 where their number depends on the data."""
    if marker.target is MARKER:
        return prod(shape_of(marker.args[1]))  # type: ignore[arg-type]
    branches = marker.args[6]
    assert isinstance(branches, int)
    return branches


def _extract(
    output: fx.Node, entries: tuple[fx.Node, ...], own: list[fx.Node], inside: set[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"rows_{i}") for i, node in enumerate(entries)}
    copies |= {node: graph.placeholder(f"parameter_{i}") for i, node in enumerate(own)}
    rows = shape_of(entries[0])[0]
    layouts = token_layouts(output.graph, dict.fromkeys(entries, Layout(0, 0, 1, rows)))
    for node in sorted(inside):
        if node not in copies:
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            # Names must not depend on the layer, so that equal bodies get equal code and share one key.
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, f"value_{len(copies)}")
            _free_row_count(copies[node], node, layouts)
    graph.output(copies[output])
    return fx.GraphModule({}, graph)


def _free_row_count(copy: fx.Node, node: fx.Node, layouts: Layouts) -> None:
    """Replace a literal row count in a view by -1: an expert gets as many rows as are routed to it."""
    if node.target in _RESIZED and node in layouts and node.target is not operator.getitem:
        size = list(shape_of(node))
        size[layouts[node].token] = -1
        copy.target = torch.ops.aten.reshape.default
        copy.args = (copy.args[0], size)
