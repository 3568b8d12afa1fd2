"""What the measurements in docs/policies.md say is best without tuning: the default.

The change over the whole stack is extrapolated: that has the smallest cache and the fastest cache steps, and no finer
cache is nearer to the uncached pictures. Where blocks lie outside of it, since the tokens change on the way, the
output of every attention and feed-forward is. The sampler decides about the rest (runtime.loop): a deterministic one
gets the corrector, of the slope of a stochastic one half is believed. The former is seen where it is not told.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeca_compile.options import Options
from moeca_compile.passes.analysis.graph import ancestors
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.policies import layerwise, stack
from moeca_compile.policies.policy import CACHING, Policy


def declare(options: Options, regions: Regions) -> Sequence[Replacement]:
    """Those of `stack`; those of `fora` where a cache step would still run blocks."""
    policy = stack if _are_all_within(regions.stacks, regions) else layerwise
    return policy.declare(options, regions)


def _are_all_within(stacks: Sequence[stack.Span], regions: Regions) -> bool:
    """Whether no residual branch is computed any more once the streams' changes are known."""
    if not stacks:
        return False
    starts, ends = zip(*stacks, strict=True)
    output = next(iter(reversed(ends[0].graph.nodes)))
    computed = ancestors([output, *starts], stop=ends)
    return not any(residual.output in computed for residual in regions.residuals)


_FORECASTS = (*stack.POLICY.forecasts, *layerwise.POLICY.forecasts)

POLICY = Policy(
    reuses="what `stack-forecast` reuses, or `fora-forecast` where no stream runs through all blocks (the default)",
    recipes={"auto": {"forecast": _FORECASTS, "schedule": "tapered"}},
    options=CACHING | {"sampler"},
    declare=declare,
    forecasts=_FORECASTS,
    stands_in=False,  # the recipes that it takes do
)
