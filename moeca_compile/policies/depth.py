"""Between which values of the residual stream some blocks lie, for recipes that cache a part of the blocks as one.

A *depth* counts the blocks that a stream has passed: 0 is the stream before the first block.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from moeca_compile.passes.analysis.axis import offset_in
from moeca_compile.passes.analysis.graph import ancestors
from moeca_compile.passes.match.regions import Regions
from moeca_compile.policies.block import blocks_of
from moeca_compile.policies.stack import Span


def depth_of(regions: Regions) -> int:
    """How many blocks the output's streams pass; the fewest of them, and 0 where there is none."""
    return min((len(_path(regions, *stack)) - 1 for stack in regions.stacks), default=0)


def depths_among(outputs: Collection[fx.Node]) -> dict[fx.Node, int]:
    """For each of these nodes of a graph, how many others of them it is computed from, one after the other."""
    behind: dict[fx.Node, int] = {}
    for node in next(iter(outputs)).graph.nodes if outputs else ():
        most = max((behind[arg] for arg in node.all_input_nodes), default=0)
        behind[node] = most + (node in outputs)
    return {node: behind[node] - 1 for node in outputs}


def spans(regions: Regions, first: int, last: int) -> list[Span]:
    """What lies between two depths, in each token stream.

    Empty where there is no such depth, and where streams are joined before the last depth while blocks come after it:
    the change would begin in several streams and end in one.
    """
    depth = depth_of(regions)
    if not 0 <= first < last <= depth:
        return []
    if last == depth:
        return [(_path(regions, start, end)[first], end) for start, end in regions.stacks]
    chains = _chains(regions)
    return [(chain[first], chain[last]) for chain in chains] if all(last < len(chain) for chain in chains) else []


def _path(regions: Regions, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The stream of a stack by depth, with whatever other tokens are joined to it on the way."""
    axis = regions.axis(end)
    after = [after for _, after in blocks_of(regions) if start < after and not end < after]
    holding = [stream for stream in after if offset_in(regions.axis(stream), axis) is not None]
    return [start, *holding[:-1], end]


def _chains(regions: Regions) -> list[list[fx.Node]]:
    """By depth, each stream that begins before all blocks, up to where it is joined with others."""
    after, adds = dict(blocks_of(regions)), {residual.add for residual in regions.residuals}
    chains = [[start] for start in after if adds.isdisjoint(ancestors([start]))]
    for chain in chains:
        while chain[-1] in after:
            chain.append(after[chain[-1]])
    return chains
