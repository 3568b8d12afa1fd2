"""Ops in a step's graph that need the host. A graph without any can be recorded as a CUDA graph and replayed.

A recorded step consists of kernels alone. Whatever the host computes during recording (a shape from the data, an op
on a CPU tensor) would be frozen at the value it had then, so a step is recorded only where no such op is found.
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
    aten.masked_select.default: "has a shape that depends on the data",
    aten.nonzero.default: "has a shape that depends on the data",
    aten.bincount.default: "has a shape that depends on the data",
    aten.repeat_interleave.Tensor: "has a shape that depends on the data",
    aten.repeat_interleave.self_Tensor: "has a shape that depends on the data",
}
"""Ops that prevent recording, by name; the tags below catch ops that are not listed."""

_TAGS = {
    torch.Tag.data_dependent_output: "reads a value on the host",
    torch.Tag.dynamic_output_shape: "has a shape that depends on the data",
}
# Ops that draw random numbers may be recorded: torch advances their generator at every replay.

_EXPERTS = tuple(
    getattr(torch.ops.moeca, name).default
    for layout in ("fixed_k", "variable_k")
    for name in (f"{layout}_outputs", f"{layout}_outputs_into", f"refresh_{layout}")
)

_INDEXED = (aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten._unsafe_index_put.default)
"""Ops that take masks or positions as indices; only masks must be counted on the host."""


def host_ops(graph: fx.Graph, device: torch.device) -> list[str]:
    """The ops that need the host in a step that runs on `device`: op and reason, one text each."""
    found = []
    for node in graph.nodes:
        reason = _outside(node, device) or (_reason(node) if node.op == "call_function" else None)
        if reason is not None:
            found.append(f"{_name(node)} {reason}")
    return found


def ops_without_kernel(graph: fx.Graph, device: torch.device) -> list[str]:
    """The ops of this package in the graph that have no kernel for the type of `device`.

    Their fallback reads the number of rows of each expert on the host.
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
    return None if other is None else f"is on {other}"


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
    """The tensors of a node's value, most of them fake."""
    if node.op == "get_attr":
        value: Any = getattr(node.graph.owning_module, str(node.target), None)
    else:
        value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [value for value in values if isinstance(value, Tensor)]


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else f"{node.op} {node.name}"
