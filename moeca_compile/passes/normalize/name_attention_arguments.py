"""Write the arguments of every attention in one way, which matching relies on.

Before:  scaled_dot_product_attention(q, k, value=v, attn_mask=None, dropout_p=0.0, scale=0.5)
After:   scaled_dot_product_attention(q, k, v, scale=0.5)
"""

from __future__ import annotations

from typing import Any

from torch import fx

from moeca_compile.ops.aten import SDPA

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def name_attention_arguments(graph: fx.Graph) -> int:
    """Pass query, key and value by position, and options by name where they differ from the default.

    Rewrites the graph in place; returns how many attentions changed.
    """
    changed = 0
    for node in graph.find_nodes(op="call_function", target=SDPA):
        args, kwargs = _named(node)
        changed += (args, kwargs) != (node.args, node.kwargs)
        node.args, node.kwargs = args, kwargs
    return changed


def _named(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
    args = (given.pop("query"), given.pop("key"), given.pop("value"))
    options = {name: v for name, v in given.items() if v is not _DEFAULTS[name] and v != _DEFAULTS[name]}
    return args, options
