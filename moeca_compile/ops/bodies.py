"""The registry of expert bodies: an op cannot take a function, so it takes the key of one.

A body is what one expert computes, as a graph of (rows..., parameters...). It is stored under a hash of its
code, so equal bodies share one entry and a compiled graph that is loaded again finds the same key.
"""

from __future__ import annotations

import hashlib

from torch import Tensor, fx

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
