"""Which parts of the model a step computes anew. Step numbers alone decide this, on the host."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.rewrite.kinds import Part


@dataclass(frozen=True)
class RefreshPlan:
    """Which parts of the model a step computes anew; the others come from caches."""

    attention: bool
    experts: bool


EVERYTHING = RefreshPlan(attention=True, experts=True)


def parts_to_refresh(config: MoecaConfig, cached: Set[Part], number: int) -> RefreshPlan:
    """What step `number` (from 0) of a generation computes anew.

    Each part has its own interval (`attention_every`, `experts_every`). Without one, it follows `full_steps` if that
    is set, else `full_every`. If Part.WHOLE is among the `cached` parts, only full steps compute anything anew.
    """
    attention = _is_due(config, config.attention_every, number)
    experts = _is_due(config, config.experts_every, number)
    both = attention and experts
    return RefreshPlan(both, both) if Part.WHOLE in cached else RefreshPlan(attention, experts)


def _is_due(config: MoecaConfig, interval: int | None, number: int) -> bool:
    if interval is not None:
        return number % interval == 0
    if config.full_steps is not None:
        return number in config.full_steps
    return number % config.full_every == 0
