"""DiT, the dense baseline of the other families: feed-forwards are MLPs, and positions are added to the tokens."""

from __future__ import annotations

from examples.dit import Block, DiffusionTransformer, Mlp, Sizes
from examples.families.common import Family


class DiT(DiffusionTransformer):
    def __init__(self, sizes: Sizes) -> None:
        hidden = int(sizes.mlp_ratio * sizes.width)
        super().__init__(sizes, lambda index: Block(sizes.width, sizes.heads, lambda: Mlp(sizes.width, hidden)))


FAMILY = Family(
    DiT,
    published={
        "DiT-S": Sizes(width=384, depth=12, heads=6),
        "DiT-B": Sizes(width=768, depth=12, heads=12),
        "DiT-L": Sizes(width=1024, depth=24, heads=16),
    },
    reduced=Sizes(width=32, depth=3, heads=4, side=8, classes=10),
)
