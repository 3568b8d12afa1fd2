"""Block caching: the change that a whole block (attention and feed-forward) makes to the residual stream.

The first block runs at every step, because it reads the new noisy input. A cache step runs the embedding, the first
block and the head, and adds the cached changes of the other blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from moeca_compile.options import Options
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.policies.policy import CACHING, Policy
from moeca_compile.policies.stack import change_replacement


def declare(options: Options, regions: Regions) -> Sequence[Replacement]:
    """For every block but the first, the stream after it: the stream before it plus the cached change."""
    blocks = enumerate(blocks_of(regions))
    return [change_replacement(options, *ends, f"block.{i}", "blocks") for i, ends in blocks if i]


def blocks_of(regions: Regions) -> list[tuple[fx.Node, fx.Node]]:
    """The streams before and after each block. A block's residual branches end with a feed-forward.

    Where attention and feed-forward stand side by side, in one branch, each branch is a block.
    """
    attentions = {attention.residual for attention in regions.attentions}
    open_blocks: dict[fx.Node, fx.Node] = {}  # latest stream of an unfinished block -> the stream before it
    blocks = []
    for residual in regions.residuals:
        before = open_blocks.pop(residual.stream, residual.stream)
        if residual in attentions:
            open_blocks[residual.add] = before
        else:
            blocks.append((before, residual.add))
    if not blocks:
        return [(residual.stream, residual.add) for residual in regions.residuals]
    return sorted([*blocks, *((before, after) for after, before in open_blocks.items())])


POLICY = Policy(
    reuses="the change that each block but the first makes, as it was or extrapolated",
    recipes={"block": {}, "block-forecast": {"forecast": ("blocks",)}},
    options=CACHING | {"attention_every", "experts_every"},
    declare=declare,
    forecasts=("blocks",),
    needs="more than one block",
)
