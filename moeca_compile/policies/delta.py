"""Delta-DiT: early in a generation the last blocks are cached, late the first ones.

    early:  h_(L-c) -> h_(L-c) + (h_L - h_(L-c)) of the last full step        "rear"
    late:   h_0 -> h_0 + (h_c - h_0) of the last full step                    "front"

with L blocks, of which c are cached. Early steps settle the outlines of a picture, which the first blocks make; late
ones the details, which the last blocks make. Full steps fill both caches, so that cache steps before and after the
boundary may follow one full step.

Source: Delta-DiT (Chen et al. 2024, arXiv 2406.01125). It chooses c and the boundary for each model and sampler;
three quarters of the blocks and the middle of the generation are the defaults here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moeca_compile.options import Options
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.policies.depth import depth_of, spans
from moeca_compile.policies.policy import CACHING, CacheStepAt, Policy
from moeca_compile.policies.stack import change_replacements

REAR, FRONT = "rear", "front"


def declare(options: Options, regions: Regions) -> Sequence[Replacement]:
    """In each token stream, the change over the last blocks, and that over the first."""
    depth = depth_of(regions)
    cached = max(1, min(round(options.cached_blocks * depth), depth - 1))
    groups = {REAR: spans(regions, depth - cached, depth), FRONT: spans(regions, 0, cached)}
    if not all(groups.values()) or depth < 2:
        return ()
    return [
        replace(replacement, group=group)
        for group, found in groups.items()
        for replacement in change_replacements(options, found, group, "blocks")
    ]


def group_at(options: Options, at: CacheStepAt) -> str:
    """The group that a step takes from the cache. Where the number of steps is not known, all are early."""
    return REAR if at.steps is None or at.number < options.boundary * at.steps else FRONT


POLICY = Policy(
    reuses="the change of the last blocks early in a generation, and of the first blocks late",
    recipes={"delta": {}},
    options=CACHING - {"corrector", "max_error"} | {"cached_blocks", "boundary"},
    declare=declare,
    stands_in=False,
    forecasts=("blocks",),
    needs="more than one block, and token streams that are not joined within the first cached_blocks of them",
    group_at=group_at,
)
