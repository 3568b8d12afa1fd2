"""Block caching: the change that each block makes to its stream, attention and feed-forward together.

The first block runs at every step: it is the one that meets the new noise. A cache step is embedding, first block,
the cached changes of the others, and head.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from moeca_compile.options import Options
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.policies.policy import CACHING, Policy, replaced_schedule
from moeca_compile.policies.stack import change_replacement


def declare(options: Options, regions: Regions) -> Sequence[Replacement]:
    """The stream after every block but the first, each from the stream before it."""
    blocks = enumerate(blocks_of(regions))
    return [change_replacement(options, *ends, f"block.{i}", "blocks") for i, ends in blocks if i]


def blocks_of(regions: Regions) -> list[tuple[fx.Node, fx.Node]]:
    """The streams before and after each block: residual branches one after the other, up to a feed-forward."""
    attentions = {attention.residual for attention in regions.attentions}
    under_way: dict[fx.Node, fx.Node] = {}  # the stream before the block, by the stream so far
    blocks = []
    for residual in regions.residuals:
        before = under_way.pop(residual.stream, residual.stream)
        if residual in attentions:
            under_way[residual.add] = before
        else:
            blocks.append((before, residual.add))
    return sorted([*blocks, *((before, after) for after, before in under_way.items())])


POLICY = Policy(
    reuses="the change that each block but the first makes, as it was or extrapolated",
    recipes={"block": {}, "block-forecast": {"forecast": ("blocks",)}},
    options=CACHING | {"attention_every", "experts_every"},
    declare=declare,
    forecasts=("blocks",),
    needs="more than one block",
    ignored=replaced_schedule,
)
