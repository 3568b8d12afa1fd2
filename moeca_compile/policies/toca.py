"""ToCa: all attention comes from the cache, and each feed-forward is recomputed on the tokens of the highest score.

Full step: attention outputs, outputs of feed-forwards and MoE layers, and what scores need of attention are cached.
Cache step, layer by layer (token_wise.py):
  attention: the cached output, with the gate of this step
  feed-forward: recomputed on a share of the tokens, whose rows of the cached output are overwritten; then the whole
    cached output is added, with the gate of this step

    share = fresh_ratio * 2.5 * (1.4 - 0.8 s / T) * (1.8 - 1.6 l / (L - 1)), at most 1

with s the steps that are left, of T, and l the layer, of L. So later steps and earlier layers recompute more. Scores
are in token_scores.py.

Source: ToCa (Zou et al., ICLR 2025, arXiv 2410.05317), with the settings of its code for DiT ("ddpm250"), in which
MoECa compares it (section 8.2): fresh_ratio 0.07, N = 4. There, the factor of attention is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeca_compile.options import Options
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.policies.policy import KEEPING, SPACED, CacheStepAt, Policy
from moeca_compile.policies.token_wise import TokenWise

MODULE = 2.5
"""The factor of feed-forwards; that of attention is 0."""
EARLY, LATE = 0.6, 1.4
"""The factors of the first and last steps."""
CAPACITIES = (*(i / 16 for i in range(1, 9)), 1.0)
"""Capacity buckets: the share falls evenly over the layers, so they lie evenly. With the default fresh_ratio no layer
exceeds 0.441; beyond a half there is one bucket, to spare graphs."""


def share_at(options: Options, at: CacheStepAt) -> float:
    """The ratio of a step before the factor of the layer; with the mean factor where T is not known."""
    left = 0.5 if at.steps is None else max(0, at.steps - 1 - at.number) / at.steps
    return options.fresh_ratio * MODULE * (LATE - (LATE - EARLY) * left)


def largest_share(options: Options) -> float:
    """That of the last step."""
    return options.fresh_ratio * MODULE * LATE


def declare(options: Options, regions: Regions) -> Sequence[Replacement]:
    """Attention outputs as they were, and the outputs of feed-forwards and MoE layers, refreshed on chosen tokens."""
    return TokenWise(options, regions, largest_share(options)).replacements()


OPTIONS = KEEPING - {"corrector"} | SPACED | {"capacities", "fresh_ratio", "token_score"}
"""Those of recipes that recompute chosen tokens of feed-forwards."""

POLICY = Policy(
    reuses="every attention, and every feed-forward but for the tokens of the highest score (ToCa)",
    recipes={"toca": {"schedule": "toca", "capacities": CAPACITIES}},
    options=OPTIONS,
    declare=declare,
    stands_in=False,
    needs="feed-forwards or MoE layers around a residual stream",
    share_at=share_at,
    weighs_age=lambda options: True,
)
