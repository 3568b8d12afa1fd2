"""The registry of expert bodies: an op cannot take a function, so it takes the key of one.

A body is what one expert computes, as a graph of (rows..., parameters...). It is stored under a hash of its
code, so equal bodies share one entry and a compiled graph that is loaded again finds the same key.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.ops.linear import grouped_linear

_LINEAR = torch.ops.aten.linear.default
_BODIES: dict[str, fx.GraphModule] = {}


def register(body: fx.GraphModule) -> str:
    """Store `body` (rows first, parameters after) and return its key."""
    key = hashlib.sha256(body.code.encode()).hexdigest()[:16]
    _BODIES.setdefault(key, body)
    return key


def graph(key: str) -> fx.GraphModule:
    """The body that was stored under `key`. Raises KeyError for one that was not."""
    return _BODIES[key]


def run(key: str, rows: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """One expert on its rows: each of `rows` (R, ...) -> (R, width)."""
    result: Tensor = _BODIES[key](*rows, *parameters)
    return result


def run_by_expert(key: str, rows: list[Tensor], offsets: Tensor, parameters: list[Tensor], experts: int) -> Tensor:
    """Each expert on its own rows.

    Args:
        key: of the body.
        rows: each (R, ...), sorted by expert.
        offsets: (experts + 1,) int64, where the rows of each expert begin, and R.
        parameters: expert-major, experts * P tensors.

    Returns:
        (R, width).
    """
    body = _BODIES[key]
    each = len(parameters) // experts
    if _linear_in_parameters(body, len(rows)):
        by_place = [parameters[place::each] for place in range(each)]
        return _all_at_once(body, rows, offsets, by_place)
    return torch.cat(
        [
            run(key, [value[start:end] for value in rows], parameters[e * each : (e + 1) * each])
            for e, (start, end) in enumerate(pairwise(offsets.tolist()))
            if end > start or e == 0
        ]
    )


def _linear_in_parameters(body: fx.GraphModule, rows: int) -> bool:
    """Whether linear layers alone take parameters, as weights and biases: all else is the same for all experts."""
    parameters = body.graph.find_nodes(op="placeholder")[rows:]
    return all(user.target is _LINEAR and user.args[0] is not node for node in parameters for user in node.users)


def _all_at_once(body: fx.GraphModule, rows: list[Tensor], offsets: Tensor, parameters: list[list[Tensor]]) -> Tensor:
    """The body node by node on the rows of all experts, its linear layers by group."""
    inputs = [*rows, *parameters]
    values: dict[fx.Node, Any] = {}
    for node in body.graph.nodes:
        if node.op == "placeholder":
            values[node] = inputs[len(values)]
        elif node.op == "output":
            return values[node.args[0]]
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = _linear(offsets, *args) if node.target is _LINEAR else node.target(*args, **kwargs)
    raise AssertionError("a graph has an output")


def _linear(offsets: Tensor, x: Tensor, weights: list[Tensor], biases: list[Tensor] | None = None) -> Tensor:
    flat = x.flatten(0, -2)
    per_row = len(flat) // max(len(x), 1)
    return grouped_linear(flat, offsets * per_row, weights, biases).view(*x.shape[:-1], len(weights[0]))
