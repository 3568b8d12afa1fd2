"""Match residual branches: stream + gate * f(stream), in either operand order, with or without a gate."""

from __future__ import annotations

import torch
from torch import fx

from moeca_compile.passes.regions import Residual, ancestors
from moeca_compile.passes.token_axis import shape_of

aten = torch.ops.aten
ADD = (aten.add.Tensor,)
MUL = (aten.mul.Tensor,)


def residual_around(anchor: fx.Node) -> Residual | None:
    """The residual branch that the value of `anchor` (an attention, an MoE layer) ends in.

    Walks forward from the anchor along its only path until an addition whose other operand the anchor itself
    was computed from. None where the path forks or no such addition follows.
    """
    upstream = ancestors([anchor]) - {anchor}
    path = {anchor}
    node = anchor
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None
        add = users[0]
        stream = _other_operand(add, node, ADD)
        if stream is not None and stream in upstream and shape_of(stream) == shape_of(add):
            return Residual(stream, _before_gate(node, path), add)
        path.add(add)
        node = add


def residual_at(add: fx.Node, tokens: set[fx.Node]) -> Residual | None:
    """The residual branch that the addition `add` ends, where one operand is computed from the other.

    `tokens` are the nodes that carry the token axis; a branch must, and so must its stream.
    """
    if add.target not in ADD or len(add.all_input_nodes) != 2:
        return None
    for stream, branch in (add.all_input_nodes, add.all_input_nodes[::-1]):
        same_shape = shape_of(stream) == shape_of(branch) == shape_of(add)
        if same_shape and stream in tokens and branch in tokens:
            inner = ancestors([branch], stop=(stream,))
            if stream in inner:
                carried = {node for node in inner if node in tokens}
                return Residual(stream, _before_gate(branch, carried), add)
    return None


def _before_gate(branch: fx.Node, carried: set[fx.Node]) -> fx.Node:
    """`output` of branch = gate * output, where the gate is not computed from the branch's own path."""
    while branch.target in MUL and len(branch.all_input_nodes) == 2:
        inside = [arg for arg in branch.all_input_nodes if arg in carried]
        if len(inside) != 1 or shape_of(inside[0]) != shape_of(branch):
            break
        branch = inside[0]
    return branch


def _other_operand(node: fx.Node, one: fx.Node, targets: tuple[object, ...]) -> fx.Node | None:
    if node.target not in targets or len(node.all_input_nodes) != 2:
        return None
    return next(arg for arg in node.all_input_nodes if arg is not one)
