"""Forecasts: a cached value extrapolated along the timestep, as a weighted sum of its values at the last full steps.

The weights come from the host, so that one compiled step serves all distances, and another rule needs no other step:
it is a function of times. A rule with K slots keeps the values of the last K full steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """How values are extrapolated.

    Attributes:
        slots: K, how many full steps a forecast reads at most.
        weights: (times of up to K full steps, the newest first; time of this step) -> a weight for each of them. They
            sum to 1.
    """

    slots: int
    weights: Callable[[Sequence[float], float], Sequence[float]]


def linear(times: Sequence[float], time: float) -> Sequence[float]:
    """The straight line through the last two values; the last value where there is one time only."""
    last, *before = times
    if not before or before[0] == last:
        return (1.0, *[0.0] * len(before))
    ahead = (time - last) / (last - before[0])
    return 1.0 + ahead, -ahead


RULE = Rule(2, linear)
"""The rule of every forecast."""


def slots_of(forecast: bool) -> int:
    """How many slots a cached value has."""
    return RULE.slots if forecast else 1


def slot_weights(times: Sequence[float], filled: int, time: float, slope: float = 1.0) -> list[list[float]]:
    """(K, K) weights of a part's slots; row h - 1 is for values that the last h full steps computed.

    Where there were fewer than h, the row is that of all there were. Weights are in the order of the slots, so that a
    compiled step need not know which is the newest.

    Args:
        times: of the part's last full steps, the newest first.
        filled: how many there were. Each filled the slot after that of the one before, from 0.
        time: of this step.
        slope: how much of the change that the rule foresees is believed, from 0 to 1.
    """
    slots, rows = RULE.slots, []
    for known in range(1, slots + 1):
        row = [0.0] * slots
        for age, weight in enumerate(RULE.weights(times[:known], time) if times else ()):
            row[(filled - 1 - age) % slots] = slope * weight + (0.0 if age else 1.0 - slope)
        rows.append(row)
    return rows


def weights_after_one(device: torch.device) -> Tensor:
    """(2, K, K) weights after one full step, which filled the first slot of each ring."""
    weights = torch.zeros(2, RULE.slots, RULE.slots, device=device)
    weights.select(-1, 0).fill_(1.0)
    return weights
