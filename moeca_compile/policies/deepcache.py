"""DeepCache for a transformer: the first and the last blocks run at every step, and what lies between is cached.

A cache step runs the embedding, the first n blocks, adds the cached change of the blocks after them, and runs the
last m blocks and the head.

Source: DeepCache (Ma et al. 2024, arXiv 2312.00858), which keeps the outermost layers of a U-Net fresh; those of a
transformer are its first and last blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeca_compile.options import Options
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.policies.depth import depth_of, spans
from moeca_compile.policies.policy import CACHING, Policy
from moeca_compile.policies.stack import change_replacements


def declare(options: Options, regions: Regions) -> Sequence[Replacement]:
    """In each token stream, the change between the first n blocks and the last m."""
    middle = spans(regions, options.first_blocks, depth_of(regions) - options.last_blocks)
    return change_replacements(options, middle, "middle", "middle")


POLICY = Policy(
    reuses="the change of all blocks but the first and the last",
    recipes={"deepcache": {"last_blocks": 1}},
    options=CACHING | {"first_blocks", "last_blocks"},
    declare=declare,
    stands_in=False,
    forecasts=("middle",),
    needs="more blocks than first_blocks and last_blocks together (where token streams are joined on the way, "
    "last_blocks = 0)",
)
