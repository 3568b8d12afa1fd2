"""What in a step's graph needs the host: a graph without any of it can be recorded once and replayed.

A recorded step is kernels alone. What the host does while it is recorded (a shape taken from the data, an op on a
CPU tensor) would keep the value that it had then, so a step is recorded only where nothing is found here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

import moeca_compile.ops.fixed_k
import moeca_compile.ops.variable_k  # noqa: F401  (both define ops that are named below)
from moeca_compile._torch_private import has_kernel_for

aten = torch.ops.aten

DENIED = {
    aten.item.default: "reads a value on the host",
    aten.is_nonzero.default: "reads a value on the host",
    aten._local_scalar_dense.default: "reads a value on the host",
    aten.masked_select.default: "has a shape that only the data tell",
    aten.nonzero.default: "has a shape that only the data tell",
    aten.bincount.default: "has a shape that only the data tell",
    aten.repeat_interleave.Tensor: "has a shape that only the data tell",
    aten.repeat_interleave.self_Tensor: "has a shape that only the data tell",
}
"""What must never stand in a step, by name; the tags below say the same of ops that no one thought of."""

_TAGS = {
    torch.Tag.data_dependent_output: "reads a value on the host",
    torch.Tag.dynamic_output_shape: "has a shape that only the data tell",
}
# Ops that draw random numbers pass: torch moves their generator on with every replay.

_EXPERTS = tuple(
    getattr(torch.ops.moeca, name).default
    for name in ("fixed_k_outputs", "refresh_fixed_k", "variable_k_outputs", "refresh_variable_k")
)

_INDEXED = (aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten._unsafe_index_put.default)
"""They take masks or positions for indices, and only masks have to be counted."""


def host_ops(graph: fx.Graph, device: torch.device) -> list[str]:
    """What needs the host in the graph of a step that runs on `device`, one text for each op."""
    found = []
    for node in graph.nodes:
        reason = _outside(node, device) or (_reason(node) if node.op == "call_function" else None)
        if reason is not None:
            found.append(f"{_name(node)} {reason}")
    return found


def ops_without_kernel(graph: fx.Graph, device: torch.device) -> list[str]:
    """The ops of this package in the graph that have no implementation of their own for the type of `device`.

    What stands in for one reads the rows of each expert on the host.
    """
    ops = {node.target for node in graph.nodes if getattr(node.target, "namespace", None) == "moeca"}
    return sorted(str(op) for op in ops if not has_kernel_for(op, device))


def runs_experts(graph: fx.Graph) -> bool:
    """Whether expert bodies run in the graph."""
    return any(node.target in _EXPERTS for node in graph.nodes)


def _outside(node: fx.Node, device: torch.device) -> str | None:
    """Why a node that is used is not on the device."""
    if node.op == "output" or not (node.users or node.op == "call_function"):
        return None
    other = next((value.device for value in values_of(node) if value.device != device), None)
    return None if other is None else f"lies on {other}"


def _reason(node: fx.Node) -> str | None:
    if node.target in _INDEXED:
        return "counts a mask" if any(value.dtype in (torch.bool, torch.uint8) for value in _indices(node)) else None
    if node.target in DENIED:
        return DENIED[node.target]
    tags = getattr(node.target, "tags", ())
    return next((reason for tag, reason in _TAGS.items() if tag in tags), None)


def _indices(node: fx.Node) -> Iterator[Tensor]:
    for index in node.args[1]:  # type: ignore[union-attr]
        if isinstance(index, fx.Node):
            yield from values_of(index)


def values_of(node: fx.Node) -> list[Tensor]:
    """The tensors that a node stands for, most of them fake."""
    if node.op == "get_attr":
        value: Any = getattr(node.graph.owning_module, str(node.target), None)
    else:
        value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [value for value in values if isinstance(value, Tensor)]


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else f"{node.op} {node.name}"
