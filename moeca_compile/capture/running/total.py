"""Where a layer's experts' outputs are summed, and with which weights.

From some node on all of them are in it linearly: base[t] + sum over e of w[t, e] * out_e[t]. That is found by other
numbers in the place of the outputs, which tell w too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.capture.numerics import close
from moeca_compile.capture.running.experts import Experts
from moeca_compile.capture.running.graph import Graph
from moeca_compile.capture.running.rows import Pairs


def totals(
    graph: Graph, experts: Experts, pairs: Pairs, own: set[fx.Node], same: dict[fx.Node, bool], tolerance: float
) -> Iterator[tuple[fx.Node, fx.Node | None, Tensor]]:
    """(sum over experts, its base, the weights (tokens, experts)), the earliest sum first.

    With one expert a token, what is not weighted yet looks like a sum, too: so such come last.
    """
    unweighted = []
    outs = [piece.out for piece in experts.pieces]
    width, tokens = graph.values[outs[0]].shape[-1], len(pairs.routed)
    generator = torch.Generator().manual_seed(0)
    probes = [
        {
            node: scale * torch.randn(graph.values[node].shape, generator=generator).to(graph.values[node])
            for node in outs
        }
        for scale in (0.0, 1.0, 3.0)
    ]
    factors = (
        torch.tensor(experts.factors).double().repeat_interleave(len(experts.own)).to(graph.values[outs[0]].device)
    )
    missing = {node: set(outs) for node in graph.nodes}
    again: list[dict[fx.Node, Any]] = [dict(probe) for probe in probes]
    for node in graph.nodes:
        if node in outs:
            missing[node] = missing[node] - {node}
        elif node in own:
            for env in again:
                env[node] = _again(graph, node, env)
            missing[node] = set.intersection(*(missing[each] for each in node.all_input_nodes))
            value = again[0][node]
            whole = isinstance(value, Tensor) and value.dtype.is_floating_point and value.shape[-1:] == (width,)
            if missing[node] or not whole or value.numel() != tokens * width:
                continue
            zero, one, three = (env[node].reshape(tokens, width).double() for env in again)
            weights = _weights(experts, pairs, probes[1], one - zero)
            if weights is None or not all(
                close(_summed(experts, pairs, probe, weights), got - zero, 4 * tolerance)
                for probe, got in ((probes[1], one), (probes[2], three))
            ):
                continue
            weights = weights / factors
            base = _base(graph, node, again[0][node], same)
            if base is not None or not bool(zero.any()):
                if all_one(weights, pairs.routed, tolerance):
                    unweighted.append((node, base, weights))
                else:
                    yield node, base, weights
    yield from unweighted


def all_one(weights: Tensor, routed: Tensor, tolerance: float) -> bool:
    of_pairs = weights[routed]
    return close(of_pairs, torch.ones_like(of_pairs), tolerance)


def _again(graph: Graph, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """A node's value where other nodes have the values of `env`."""

    def value(each: fx.Node) -> Any:
        return env[each] if each in env else graph.values[each]

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _outputs(experts: Experts, pairs: Pairs, probe: dict[fx.Node, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for piece, at, token, expert in zip(experts.pieces, pairs.at, pairs.tokens, pairs.experts, strict=True):
        yield token, expert, probe[piece.out].double().flatten(0, -2)[at]


def _weights(experts: Experts, pairs: Pairs, probe: dict[fx.Node, Tensor], total: Tensor) -> Tensor | None:
    """The weights (tokens, experts) with which the outputs add up to `total`, as nearly as can be."""
    tokens, count = pairs.routed.shape
    most = int(pairs.routed.sum(1).max())
    if most > total.shape[1]:
        return None
    slot = pairs.routed.cumsum(1) - 1
    outputs = total.new_zeros(tokens, most, total.shape[1])
    for token, expert, out in _outputs(experts, pairs, probe):
        outputs[token, slot[token, expert]] = out
    unused = torch.arange(most, device=total.device) >= pairs.routed.sum(1, keepdim=True)
    products = outputs @ outputs.transpose(1, 2) + torch.diag_embed(unused.double())
    solved = torch.linalg.solve(products, outputs @ total.unsqueeze(2)).squeeze(2)
    weights = total.new_zeros(tokens, count)
    token, expert = pairs.routed.nonzero(as_tuple=True)
    weights[token, expert] = solved[token, slot[token, expert]]
    return weights


def _summed(experts: Experts, pairs: Pairs, probe: dict[fx.Node, Tensor], weights: Tensor) -> Tensor:
    total = None
    for token, expert, out in _outputs(experts, pairs, probe):
        if total is None:
            total = out.new_zeros(len(weights), out.shape[1])
        total.index_add_(0, token, weights[token, expert, None] * out)
    assert total is not None
    return total


def _base(graph: Graph, total: fx.Node, zero: Tensor, same: dict[fx.Node, bool]) -> fx.Node | None:
    """The node that the sum starts from."""
    if not bool(zero.any()):
        return None
    for node in reversed(graph.before([total])):
        value = graph.tensor(node)
        if not same[node] or value is None or value.numel() != zero.numel() or value.shape[-1:] != zero.shape[-1:]:
            continue
        if torch.equal(value.reshape(zero.shape).to(zero), zero):
            return node
    return None
