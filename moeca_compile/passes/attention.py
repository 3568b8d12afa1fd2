"""Match self-attention whose queries, keys and values come row by row from a residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moeca_compile.passes.regions import Attention, Kept, between, module_path
from moeca_compile.passes.residuals import residuals_around
from moeca_compile.passes.token_axis import Layouts, shape_of

SDPA = torch.ops.aten.scaled_dot_product_attention.default
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def attention_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Every attention of the graph, in order."""
    return [node for node in graph.nodes if node.target is SDPA]


def match_attention(sdpa: fx.Node, layouts: Layouts) -> list[Attention | Kept]:
    """The attention region around `sdpa`, one for each stream that it joins, or the reason why it stays as it is."""
    query, key, value = sdpa.args[:3]
    name = module_path(sdpa)
    reason = _why_not(sdpa, layouts)
    residuals = residuals_around(sdpa)
    if reason is None and not residuals:
        reason = "its output reaches no residual addition with the stream that it reads"
    if reason is None and any(residual.output not in layouts for residual in residuals):
        reason = "its output is not computed token by token from the attention"
    if reason is not None:
        return [Kept("attention", name, reason)]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    names = [module_path(r.output) for r in residuals] if len(residuals) > 1 else [name]
    return [Attention(n, r, sdpa, query, key, value) for n, r in zip(names, residuals, strict=True)]


def sdpa_options(sdpa: fx.Node) -> dict[str, Any]:
    """The arguments of the attention after query, key and value, by name, defaults filled in."""
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), sdpa.args[3:], strict=False))
    return {**_DEFAULTS, **given, **sdpa.kwargs}


def _why_not(sdpa: fx.Node, layouts: Layouts) -> str | None:
    options = sdpa_options(sdpa)
    if options["dropout_p"]:
        return "it drops out at random"
    if options["is_causal"] or options["attn_mask"] is not None:
        return "a mask ties its queries to their positions"
    for operand, role in zip(sdpa.args[:3], ("queries", "keys", "values"), strict=False):
        if operand not in layouts:
            return f"its {role} are not computed token by token from the residual stream"
    if any(len(shape_of(operand)) != 4 or layouts[operand].batch != 0 for operand in sdpa.args[:3]):  # type: ignore[arg-type, index]
        return "its queries, keys and values are not (batch, heads, tokens, width)"
    if len({layouts[operand] for operand in sdpa.args[:3]}) != 1:  # type: ignore[index]
        return "its queries and keys are laid out differently"
    return None


def work_between(source: fx.Node, output: fx.Node) -> bool:
    """Whether anything worth caching (a matrix product) lies between the two."""
    aten = torch.ops.aten
    heavy = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default, aten.bmm.default)
    return any(node.target in heavy for node in between(source, [output])) and len(shape_of(output)) > 1
