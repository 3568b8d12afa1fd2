"""DuCa: ToCa's cache steps, and between them steps that skip all blocks.

After a full step come, in turn,
  an aggressive step: the stream after the last block is that of the step before
  a conservative step: a cache step of ToCa (toca.py), which also keeps its stream after the last block

By default tokens are ranked by their values, which needs no attention maps.

Source: DuCa (Zou et al. 2024, arXiv 2412.18911), as MoECa compares it (section 8.2): with ToCa's settings.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from moeca_compile.options import Options
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.kinds import Part
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.policies import toca
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.policy import CacheStepAt, Policy
from moeca_compile.policies.token_wise import TokenWise

AGGRESSIVE, CONSERVATIVE = "aggressive", "conservative"


def declare(options: Options, regions: Regions) -> Sequence[Replacement]:
    """ToCa's replacements for conservative steps, and each stream after the last block for aggressive ones."""
    token_wise = TokenWise(options, regions, toca.largest_share(options), CONSERVATIVE).replacements()
    hidden = [_hidden(options, f"hidden.{i}", *stack) for i, stack in enumerate(regions.stacks)]
    return [*token_wise, *hidden] if token_wise and hidden else []


def _hidden(options: Options, name: str, first: fx.Node, last: fx.Node) -> Replacement:
    """The stream `last` as it was; `first` is that before the first block."""
    cached = Cached(name, last, Part.WHOLE, 1, options.cache_dtype)
    return Replacement(
        last,
        first,
        Part.WHOLE,
        (cached,),
        cached.read,
        always_cached=True,
        group=AGGRESSIVE,
        filled_by=(CONSERVATIVE,),
    )


def group_at(options: Options, at: CacheStepAt) -> str:
    """Aggressive and conservative in turn, from the last full step on."""
    return AGGRESSIVE if at.since % 2 else CONSERVATIVE


def share_at(options: Options, at: CacheStepAt) -> float:
    """That of ToCa; an aggressive step recomputes no token."""
    return 0.0 if group_at(options, at) == AGGRESSIVE else toca.share_at(options, at)


POLICY = Policy(
    reuses="in turn the stream after all blocks, and what toca reuses (DuCa)",
    recipes={"duca": {"schedule": "toca", "capacities": toca.CAPACITIES, "token_score": "value_norm"}},
    options=toca.OPTIONS,
    declare=declare,
    stands_in=False,
    needs="feed-forwards or MoE layers around a residual stream that runs through all blocks",
    group_at=group_at,
    share_at=share_at,
    weighs_age=lambda options: True,
)
