"""The normalising passes in their order: what they write alike, matching has to know in one form only."""

from __future__ import annotations

import torch
from torch import fx

from moeca_compile.passes.collapse_views import VIEWS, collapse_views
from moeca_compile.passes.insert import Inserted
from moeca_compile.passes.spelled_attention import normalise_attention
from moeca_compile.passes.split_to_slices import split_to_slices
from moeca_compile.passes.token_axis import _argument as argument
from moeca_compile.passes.token_axis import shape_of

aten = torch.ops.aten


def normalise(graph: fx.Graph) -> None:
    """Rewrite the exported graph in place; the values that it computes stay the same."""
    drop_idle_dropouts(graph)
    split_products_from_sums(graph)
    collapse_views(graph)
    split_to_slices(graph)
    unflatten_linears(graph)
    normalise_attention(graph)
    reshape_views(graph)


def drop_idle_dropouts(graph: fx.Graph) -> None:
    """Take out every dropout that drops nothing, as all do in eval mode.

    Before:  y = dropout(x, 0.1, False)
    After:   x in place of y
    """
    for node in list(graph.nodes):
        if node.target is aten.dropout.default and not (argument(node, 1, "p") and argument(node, 2, "train")):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def split_products_from_sums(graph: fx.Graph) -> None:
    """Write a fused multiply-add as the two ops that a gated residual is matched by.

    Before:  h = addcmul(x, gate, y, value=v)
    After:   h = add(x, mul(gate, y), alpha=v)
    """
    for node in list(graph.nodes):
        if node.target is aten.addcmul.default:
            new = Inserted(graph, node)
            scale = node.kwargs.get("value", 1)
            options = {} if scale == 1 else {"alpha": scale}
            added = new(aten.add.Tensor, node.args[0], new(aten.mul.Tensor, *node.args[1:3]), **options)
            node.replace_all_uses_with(added)
            graph.erase_node(node)


def unflatten_linears(graph: fx.Graph) -> None:
    """A linear of rows that were flattened for it alone reads them as its result is seen.

    Before:  y = view(linear(view(x, [N * B, D]), w, b), [N, B, E])
    After:   y = linear(reshape(x, [N, B, D]), w, b)

    In between, samples and tokens would be in one dim, in either order.
    """
    for node in list(graph.nodes):
        linear = node.args[0] if node.target in VIEWS else None
        if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default or len(linear.users) > 1:
            continue
        flat, *weights = linear.args
        if not isinstance(flat, fx.Node) or flat.target not in VIEWS or shape_of(node)[-1] != shape_of(linear)[-1]:
            continue
        rows = Inserted(graph, node)(aten.reshape.default, flat.args[0], [*shape_of(node)[:-1], shape_of(flat)[-1]])
        node.target, node.args = aten.linear.default, (rows, *weights)
    graph.eliminate_dead_code()


def reshape_views(graph: fx.Graph) -> None:
    """Write every view as a reshape: a value that comes from a cache may lie in memory in another order.

    Before:  y = view(x, [N, D])
    After:   y = reshape(x, [N, D])
    """
    for node in graph.nodes:
        if node.target in VIEWS:
            node.target = aten.reshape.default
