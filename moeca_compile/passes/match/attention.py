"""Match attention whose queries are computed token by token from a residual stream, with any keys and values."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import fx

from moeca_compile.ops.aten import PRODUCTS, SDPA
from moeca_compile.passes.analysis.axis import offset_in
from moeca_compile.passes.analysis.graph import between, module_path, shape_of
from moeca_compile.passes.analysis.token_axis import Layouts
from moeca_compile.passes.match.regions import Attention, Skipped
from moeca_compile.passes.match.residuals import residuals_around

_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def attention_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Every attention of the graph, in order."""
    return [node for node in graph.nodes if node.target is SDPA]


def match_attention(sdpa: fx.Node, layouts: Layouts, mixed: Set[fx.Node] = frozenset()) -> list[Attention | Skipped]:
    """The attention regions around `sdpa`, one for each token stream that it joins, or why it is skipped.

    `mixed` are the values that mix tokens: their rows can only be gathered from the whole value.
    """
    query, key, value = sdpa.args[:3]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    name = module_path(sdpa)
    reason = _why_not(sdpa, query, layouts)
    residuals = residuals_around(sdpa)
    if reason is None and not residuals:
        reason = "its output reaches no residual addition with the stream that it reads"
    if reason is None and any(_loses_rows(sdpa, residual.output, layouts, mixed) for residual in residuals):
        reason = "its output is not computed token by token from the attention"
    if reason is not None:
        return [Skipped("attention", name, reason, sdpa)]
    names = [module_path(r.output) for r in residuals] if len(residuals) > 1 else [name]
    by_token = _by_token(sdpa, [residual.output for residual in residuals], layouts)
    return [Attention(n, r, sdpa, query, key, value, by_token) for n, r in zip(names, residuals, strict=True)]


def _loses_rows(sdpa: fx.Node, output: fx.Node, layouts: Layouts, mixed: Set[fx.Node]) -> bool:
    path = between(sdpa, [output]) | {output}
    return not path <= layouts.keys() or bool(path & mixed)


def sdpa_options(sdpa: fx.Node) -> dict[str, Any]:
    """The arguments of the attention after query, key and value, by name, defaults filled in."""
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), sdpa.args[3:], strict=False))
    return {**_DEFAULTS, **given, **sdpa.kwargs}


def _why_not(sdpa: fx.Node, query: fx.Node, layouts: Layouts) -> str | None:
    if query not in layouts:
        return "its queries are not computed token by token from the residual stream"
    if not _rows_of_heads(query, layouts) or sdpa not in layouts:
        return "its queries are not (batch, heads, tokens, width)"
    return None


def _rows_of_heads(node: fx.Node, layouts: Layouts) -> bool:
    """(batch, ..., tokens, width), where heads may be merged into the batch dim."""
    layout, ndim = layouts[node], len(shape_of(node))
    return layout.batch == 0 and not layout.merged and layout.token == ndim - 2


def _by_token(sdpa: fx.Node, outputs: list[fx.Node], layouts: Layouts) -> bool:
    """Whether keys and values hold the tokens of all outputs, so that those of chosen tokens can be refreshed."""
    query, key, value = sdpa.args[:3]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    if key not in layouts or value not in layouts:
        return False
    of_keys, of_values = layouts[key], layouts[value]
    if of_values.along(of_keys.axis) != of_keys or not _rows_of_heads(key, layouts):
        return False
    for output in outputs:
        offset = offset_in(of_keys.axis, layouts[output].axis)
        if offset is None or offset != offset_in(of_values.axis, layouts[output].axis):
            return False
    by_head = len(shape_of(query)) == len(shape_of(key)) == len(shape_of(value)) == 4
    return by_head or shape_of(query)[:-2] == shape_of(key)[:-2] == shape_of(value)[:-2]


def work_between(source: fx.Node, output: fx.Node) -> bool:
    """Whether there is work worth caching, that is a matrix product, between the two."""
    return any(node.target in PRODUCTS for node in between(source, [output])) and len(shape_of(output)) > 1
