"""Match residual branches: stream + gate * f(stream), in either operand order, with or without a gate."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import fx

from moeca_compile.ops.aten import CASTS, SDPA, VIEWS
from moeca_compile.ops.markers import ENTRY, MARKERS
from moeca_compile.passes.analysis.costs import node_flops
from moeca_compile.passes.analysis.graph import ancestors, between, shape_of
from moeca_compile.passes.analysis.token_axis import Layouts, sliced, sliced_dim
from moeca_compile.passes.match.regions import Residual

aten = torch.ops.aten
ADD = (aten.add.Tensor,)
MUL = (aten.mul.Tensor,)
ANCHORS = (SDPA, *MARKERS)


def residual_around(anchor: fx.Node) -> Residual | None:
    """The residual branch of `anchor` (an attention, an MoE layer); None where there is none, or more than one."""
    found = residuals_around(anchor)
    return found[0] if len(found) == 1 else None


def residuals_around(anchor: fx.Node) -> list[Residual]:
    """The residual branches of `anchor`, in graph order: one for each token stream.

    Walks forward from the anchor to the addition whose other operand the anchor was computed from. The output of a
    joint attention may be cut into the tokens of several streams, each with a path of its own. A path that forks and
    meets again (a norm spelled as `y * rsqrt(mean(y * y))`) goes on from there. Returns no branches where paths fork
    in any other way, or where one of them ends in no such addition. Where several anchors share a branch (attention
    and experts side by side), `output` is this anchor's part of their sum.
    """
    found: dict[fx.Node, Residual] = {}
    paths: list[tuple[fx.Node, set[fx.Node], fx.Node | None]] = [(anchor, {anchor}, None)]
    upstream = cache(lambda: ancestors([anchor]))
    while paths:
        node, path, part = paths.pop()
        users = list(node.users)
        fork = _fork(node, anchor) if len(users) > 1 else None
        if fork is not None:
            paths.append((max(fork), path | fork, part))
            continue
        if not users or (len(users) > 1 and not _cut_apart(users)):
            return []
        for add in users:
            stream = _stream(add, node, anchor)
            if stream is None:
                other = _other_operand(add, node, ADD)
                shared = part is None and other is not None and _has_anchor(other, upstream())
                paths.append((add, path | {add}, _before_gate(node, path) if shared else part))
            elif add in found:
                return []  # the parts meet again
            else:
                found[add] = Residual(stream, part or _before_gate(node, path), add)
    return [found[add] for add in sorted(found)]


def _stream(add: fx.Node, branch: fx.Node, anchor: fx.Node) -> fx.Node | None:
    """The stream to which `add` adds `branch`, a value computed from `anchor`; None where it does not."""
    other = _other_operand(add, branch, ADD)
    stream = _uncast(other) if other is not None else None
    known = stream is not None and shape_of(stream) == shape_of(add) and _leads_to(anchor, stream)
    return stream if known else None


def _fork(start: fx.Node, anchor: fx.Node) -> set[fx.Node] | None:
    """What lies between `start` and the node where all paths from it meet again, which is the last one.

    None where one of them reaches an addition to the stream, or an attention or MoE layer, before they have met.
    """
    inside, ahead = {start}, set(start.users)
    while (node := min(ahead)).users and node.target not in ANCHORS:  # none of the others leads to the first one
        if len(ahead) == 1:
            return inside | ahead
        if any(_stream(node, branch, anchor) is not None for branch in inside.intersection(node.all_input_nodes)):
            return None
        inside.add(node)
        ahead = (ahead - {node}) | set(node.users)
    return None


def _has_anchor(node: fx.Node, upstream: set[fx.Node]) -> bool:
    """Whether `node` depends on an attention or MoE layer that is not in `upstream`."""
    return any(one.target in ANCHORS for one in ancestors([node], stop=upstream) - upstream)


def _cut_apart(users: list[fx.Node]) -> bool:
    """Whether all users of a value are slices of it along one dim that do not overlap."""
    if any(user.target is not aten.slice.Tensor for user in users) or len({sliced_dim(u) for u in users}) > 1:
        return False
    bounds = sorted(sliced(user)[1] for user in users)
    return all(step == 1 for *_, step in bounds) and all(one[1] <= other[0] for one, other in pairwise(bounds))


def _leads_to(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` is computed from `source`, and is not `source` itself."""
    return node is not source and source in ancestors([node], stop=(source,), since=source)


def residual_at(add: fx.Node, layouts: Layouts) -> Residual | None:
    """The residual branch that ends in the addition `add`; None where neither operand is computed from the other.

    Both operands must have the same layout, that is, hold the same tokens.
    """
    if add.target not in ADD or len(add.all_input_nodes) != 2:
        return None
    for operand, branch in (add.all_input_nodes, add.all_input_nodes[::-1]):
        stream = _uncast(operand)
        same_shape = shape_of(stream) == shape_of(branch) == shape_of(add)
        alike = same_shape and stream in layouts and layouts.get(branch) == layouts[stream]
        if alike and _leads_to(branch, stream):
            carried = {node for node in ancestors([branch], stop=(stream,)) if node in layouts}
            return Residual(stream, _before_gate(branch, carried), add)
    return None


def branch_input(residual: Residual) -> fx.Node:
    """What enters the first product of a branch: the stream after its norm and modulation, if it has these.

    The stream itself where the branch has no product.
    """
    inside = between(residual.stream, [residual.output])
    for node in sorted(inside):
        if node_flops(node) or node.target in (ENTRY, *MARKERS):
            entering = next(arg for arg in node.all_input_nodes if arg in inside or arg is residual.stream)
            while entering.target in VIEWS | CASTS and entering.args[0] in inside:
                entering = entering.args[0]  # type: ignore[assignment]
            return entering
    return residual.stream


def _uncast(node: fx.Node) -> fx.Node:
    """The stream itself, where a sum in higher precision reads a cast of it."""
    while node.target in CASTS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _before_gate(branch: fx.Node, carried: set[fx.Node]) -> fx.Node:
    """`output` of branch = gate * output, where the gate is not among the `carried` nodes of the branch."""
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
