"""Layer-wise caching: the outputs of every attention and feed-forward, reused with the current gates (FORA).

With a forecast, the outputs are extrapolated; TaylorSeer (arXiv 2503.06923) does so to fourth order, by its own rule.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeca_compile.options import Options
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.kinds import Part
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.forecast import slots_of
from moeca_compile.policies.policy import CACHING, Policy


def declare(options: Options, regions: Regions) -> Sequence[Replacement]:
    """The output of every attention and feed-forward, before its gate."""
    attentions = {attention.residual for attention in regions.attentions}
    found = []
    for i, residual in enumerate(regions.residuals):
        part = Part.ATTENTION if residual in attentions else Part.EXPERTS
        slots = slots_of(options, part.value)
        cached = Cached(f"residual.{i}", residual.output, part, slots, options.cache_dtype)
        found.append(Replacement(residual.output, residual.stream, part, (cached,), cached.read))
    return found


TAYLORSEER = {
    "forecast": ("attention", "experts"),
    "forecaster": "taylorseer",
    "forecast_order": 4,
    "warmup_steps": 2,  # so that there are differences from the second step on
}
"""As its public code for DiT: order 4, and a full step every `full_every` after the first two."""

POLICY = Policy(
    reuses="the output of every attention and feed-forward, as it was or extrapolated",
    recipes={"fora": {}, "fora-forecast": {"forecast": ("attention", "experts")}, "taylorseer": TAYLORSEER},
    options=CACHING | {"attention_every", "experts_every"},
    declare=declare,
    forecasts=("attention", "experts"),
)
