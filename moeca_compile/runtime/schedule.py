"""Which kind of step comes next: decided on the host from step numbers alone."""

from __future__ import annotations

from dataclasses import dataclass

from moeca_compile.config import MoecaConfig


@dataclass(frozen=True)
class Fresh:
    """Which parts of the model a step runs as they are."""

    attention: bool
    experts: bool


def fresh_parts(config: MoecaConfig, number: int) -> Fresh:
    """What step `number` (from 0) of a generation computes anew.

    Every part has its own interval (`attention_every`, `experts_every`), else `full_every`; an explicit list
    of full steps takes the place of `full_every`. The stack is one part: only a full step refreshes it.
    """
    if config.recipe == "none":
        return Fresh(True, True)
    attention = _due(config, config.attention_every, number)
    experts = _due(config, config.experts_every, number)
    both = attention and experts
    return Fresh(both, both) if config.family == "stack" else Fresh(attention, experts)


def _due(config: MoecaConfig, interval: int | None, number: int) -> bool:
    if interval is not None:
        return number % interval == 0
    if config.full_steps is not None:
        return number in config.full_steps
    return number % config.full_every == 0
