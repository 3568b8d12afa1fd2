"""Floating-point operations of one node, and of several as an expression in batch and tokens."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import sympy
import torch
from torch import fx

from moeca_compile.ops.aten import MATMULS, SDPA
from moeca_compile.passes.analysis.axis import Axis, count, offset_in
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.analysis.token_axis import Layouts

aten = torch.ops.aten
_CONVOLUTIONS = (aten.convolution.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)

BATCH, TOKENS = sympy.symbols("B N", positive=True)
"""Samples and tokens a sample."""
CHOSEN, RECOMPUTED = sympy.symbols("c r", nonnegative=True)
"""On a cache step: the fraction of tokens that are chosen, and of branches that are recomputed."""


def node_flops(node: fx.Node) -> int:
    """FLOPs of one node; a multiply-add counts two. Counts matrix products, attentions and convolutions only."""
    out = shape_of(node) if "val" in node.meta else ()
    if node.target in MATMULS | {aten.linear.default}:
        return 2 * prod(out) * shape_of(node.args[0])[-1]  # type: ignore[arg-type]
    if node.target is aten.addmm.default:
        return 2 * prod(out) * shape_of(node.args[1])[-1]  # type: ignore[arg-type]
    if node.target is SDPA:
        query, key = shape_of(node.args[0]), shape_of(node.args[1])  # type: ignore[arg-type]
        return 2 * prod(query[:-1]) * key[-2] * (query[-1] + out[-1])
    if node.target in _CONVOLUTIONS:
        return 2 * prod(out) * prod(shape_of(node.args[1])[1:])  # type: ignore[arg-type]
    return 0


def symbolic_flops(
    nodes: Iterable[fx.Node], layouts: Layouts, main: Axis = (), only: Axis | None = None
) -> sympy.Expr:
    """FLOPs of `nodes` in B and N: row-wise work grows with both, attention with the square of N.

    N is the number of tokens of `main`, by default of a graph's only stream; tokens of other streams, such as text,
    stay numbers. With `only`, row-wise work is counted for the tokens of that axis alone.
    """
    terms = []
    for node in nodes:
        flops = sympy.Integer(node_flops(node))
        if flops and node in layouts:
            layout = layouts[node]
            rows = layout.axis if only is None or offset_in(layout.axis, only) is None else only
            flops = flops / (layout.samples * layout.tokens) * BATCH * token_count(rows, main)
            if node.target is SDPA and node.args[1] in layouts:
                key = layouts[node.args[1]]  # type: ignore[index]
                flops = flops / key.tokens * token_count(key.axis, main)
        terms.append(flops)
    return sympy.Add(*terms)


def token_count(axis: Axis, main: Axis = ()) -> sympy.Expr:
    """The tokens of `axis` as an expression in N, the tokens of `main`."""
    offset = offset_in(axis, main) if main else 0
    return sympy.Integer(count(axis)) if offset is None else TOKENS + count(axis) - count(main or axis)
