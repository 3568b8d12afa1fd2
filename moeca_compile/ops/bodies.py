"""The registry of expert bodies. Ops cannot take functions as arguments, so they take a body's key.

A body is what one expert computes, as a graph of (rows..., parameters...). Its key is a hash of its code, so equal
bodies share one entry, and a compiled graph that is loaded from disk has the same key.
"""

from __future__ import annotations

import hashlib

from torch import Tensor, fx

from moeca_compile.ops.exchange import count_of

_BODIES: dict[str, fx.GraphModule] = {}


def register(body: fx.GraphModule, group: str = "", places: int = 0) -> str:
    """Store `body` (rows first, parameters after) and return its key.

    group, places: of which ranks hold the experts, "" for this one alone, and how rows are sent there (ops.exchange).
    """
    key = hashlib.sha256(body.code.encode()).hexdigest()[:16]
    key += f"@{places}@{group}" if group else ""
    _BODIES.setdefault(key, body)
    return key


def exchange_of(key: str) -> tuple[str, int]:
    """The group and the places that a body was registered with."""
    _, *exchange = key.split("@", 2)
    return (exchange[1], int(exchange[0])) if exchange else ("", 0)


def held_here(key: str, experts: int) -> int:
    """How many of all ranks' experts this one holds."""
    return experts // count_of(exchange_of(key)[0])


def graph(key: str) -> fx.GraphModule:
    """The body with this key. Raises KeyError for an unknown key."""
    return _BODIES[key]


def run(key: str, rows: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """Run one expert on its rows: `rows` each (R, ...), `parameters` of that expert -> (R, width)."""
    result: Tensor = _BODIES[key](*rows, *parameters)
    return result
