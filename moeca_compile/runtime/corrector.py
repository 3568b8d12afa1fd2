"""The corrector: a full step makes up for what the cache steps before it got wrong.

A full step r gives the exact output v_r; a cache step in its place would have given v^_r. A forecast's error grows
along the gap in a known way, so v_r - v^_r tells the errors of all steps in the gap. A deterministic sampler has
added each of them to the picture, times its step of time. Their sum is made up for in one output,
v_r + g (v_r - v^_r), so no sampler has to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def gain(full: Sequence[float], passed: Sequence[float], time: float) -> float:
    """The weight g of a full step's error, for errors like those of an interpolation through the full steps before.

    The error of a cache step at t_j is that of the full step at t_r times (t_j - t_q) / (t_r - t_q) for values kept
    from t_q, times (t_j - t_p) / (t_r - t_p) besides for straight lines through t_p and t_q, and so on with each
    further value of a polynomial. Each counts by the time that its step took, in units of the last one.

    Args:
        full: the times of the full steps that forecasts go through, the newest first: one more than their order.
        passed: those of the cache steps since then, in order.
        time: that of this full step.

    Returns 0 where there is nothing to make up for: no cache step, or none that took any time.
    """
    if not passed or time in (passed[-1], *full):
        return 0.0
    total = 0.0
    for now, later in pairwise([*passed, time]):
        share = (later - now) / (time - passed[-1])
        for known in full:
            share *= (now - known) / (time - known)
        total += share
    return total


def corrected(outputs: Sequence[Any], predicted: Sequence[Any], weight: float) -> tuple[Any, ...]:
    """The outputs, each floating-point tensor v as v + weight (v - v^). In 16 bits this is computed in float32."""
    return tuple(_corrected(value, guess, weight) for value, guess in zip(outputs, predicted, strict=True))


def _corrected(value: Any, guess: Any, weight: float) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    wide = torch.promote_types(value.dtype, torch.float32)
    return torch.lerp(guess.to(wide), value.to(wide), 1 + weight).to(value.dtype)
