"""Insert the ops of a plain function into a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from moeca_compile._torch_private import trace_to_graph


def insert_traced(graph: fx.Graph, before: fx.Node, function: Callable[..., Any], *args: Any) -> tuple[fx.Node, ...]:
    """Insert the ops of `function` on these nodes and constants; returns the nodes of its results."""
    traced = trace_to_graph(function, *(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args)).graph
    inputs = traced.find_nodes(op="placeholder")
    known = dict(zip(inputs, args, strict=True))
    with graph.inserting_before(before):
        results: Any = graph.graph_copy(traced, known)
    return results if isinstance(results, tuple) else (results,)
