"""Schedules from uncached trajectories: which steps of this model and sampler to run in full.

A cache step forecasts from the last two full steps q > p, and what such forecasts cannot express is the part of the
outputs between q and the next full step r that lies outside the span of v_q and v_p. With the corrector, v_r is there
too. So each gap (p, q, r) has a cost that inner products of the recorded outputs give, and dynamic programming over
(p, q) finds the full steps with the least cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_STEPS = 256
"""Costs take steps^3 numbers; longer generations are not calibrated."""
_PREDICTION = 0.1
"""What a gap's error without correction counts beside the error with it: it enters the model until the next full
step."""
_RIDGE = 1e-9
_IMPOSSIBLE = 1e30
"""The cost of what cannot be; finite, so that it may be weighted by 0."""
WEIGHTS = {"calibrated": (1.0, 0.01), "calibrated-mean": (0.0, 1.0)}
"""Kinds of schedules, by how much the largest cost of a gap counts, and the sum over gaps. In the first, the sum
decides between schedules with the same largest cost."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """Of gaps: `first[r]` from full step 0 alone up to r, `gaps[p, q, r]` from full steps p < q. r = S is the end."""

    first: Array
    gaps: Array


def costs(gram: Array, weights: Array) -> Costs:
    """The cost of each gap.

    Args:
        gram: [S, S] inner products <v_i, v_j> of the model's outputs at steps i and j, summed over trajectories.
        weights: [S] time that each step takes, of a sum of 1.
    """
    steps = len(gram)
    with_outputs = np.vstack([np.zeros(steps), np.cumsum(weights[:, None] * gram, axis=0)])  # sums of w_j v_j, j < k
    squares = np.zeros((steps + 1, steps + 1))
    squares[1:, 1:] = np.cumsum(np.cumsum(weights[:, None] * gram * weights[None, :], axis=0), axis=1)
    first, gaps = np.full(steps + 1, _IMPOSSIBLE), np.full((steps, steps, steps + 1), _IMPOSSIBLE)
    for q in range(steps):
        ends = np.arange(q + 1, steps + 1)
        with_all = with_outputs[ends] - with_outputs[q + 1]  # [R, S]: <b, v_i> for the gap up to each end
        size = squares[ends, ends] - 2 * squares[q + 1, ends] + squares[q + 1, q + 1]
        if q == 0:
            first[ends] = _costs(gram, with_all, size, ends, np.array([[0]]))[0]
        else:
            pairs = np.stack([np.full(q, q), np.arange(q)], axis=1)
            gaps[:q, q, ends] = _costs(gram, with_all, size, ends, pairs)
    return Costs(first, gaps)


def _costs(gram: Array, with_all: Array, size: Array, ends: NDArray[np.int64], known: NDArray[np.int64]) -> Array:
    """[P, R] costs of gaps up to each of R ends, for each of P sets of known full steps [P, K]."""
    steps = len(gram)
    shape = (len(known), len(ends), known.shape[1])
    from_known = np.broadcast_to(known[:, None, :], shape)
    predicted = _outside(gram, with_all, size, from_known)
    inner = ends < steps
    with_end = np.concatenate(
        [from_known, np.broadcast_to(np.minimum(ends, steps - 1)[None, :, None], (*shape[:2], 1))], 2
    )
    corrected = np.where(inner, _outside(gram, with_all, size, with_end), predicted)
    return corrected + _PREDICTION * predicted


def _outside(gram: Array, with_all: Array, size: Array, known: NDArray[np.int64]) -> Array:
    """[P, R] squared size of what lies outside the span of the outputs at `known` [P, R, K]."""
    inner = gram[known[..., :, None], known[..., None, :]]
    ridge = _RIDGE * np.trace(inner, axis1=-2, axis2=-1)[..., None, None] * np.eye(known.shape[-1])
    across = np.take_along_axis(np.broadcast_to(with_all, (len(known), *with_all.shape)), known, axis=2)
    solved = np.linalg.solve(inner + ridge + 1e-30 * np.eye(known.shape[-1]), across[..., None])[..., 0]
    found: Array = np.maximum(size - (across * solved).sum(-1), 0.0)
    return found


def schedules(found: Costs, most: int, weights: tuple[float, float]) -> dict[int, tuple[int, ...]]:
    """The best full steps of each number from 1 to `most`.

    Args:
        weights: how much the largest cost of a gap counts, and the sum of all.
    """
    steps, (of_worst, of_sum) = len(found.gaps), weights
    worst = np.full((steps, steps), _IMPOSSIBLE)  # by the last two full steps
    worst[0] = found.first[:steps]
    total = worst.copy()
    before: list[NDArray[np.int64]] = []
    results: dict[int, tuple[int, ...]] = {1: (0,)}
    for number in range(2, most + 1):
        ends = found.gaps[:, :, steps]
        value = of_worst * np.maximum(worst, ends) + of_sum * (total + ends)
        p, q = np.unravel_index(np.argmin(value), value.shape)
        results[number] = _traced(int(p), int(q), before)
        worst, total, chosen = _one_more(found.gaps, worst, total, weights)
        before.append(chosen)
    return results


def _one_more(
    gaps: Array, worst: Array, total: Array, weights: tuple[float, float]
) -> tuple[Array, Array, NDArray[np.int64]]:
    """The largest cost and the sum by the last two full steps, with one full step more; and which one was before."""
    steps = len(gaps)
    most, added = np.full_like(worst, _IMPOSSIBLE), np.full_like(total, _IMPOSSIBLE)
    chosen = np.zeros((steps, steps), np.int64)
    for q in range(1, steps):
        inner = gaps[:q, q, :steps]  # [P, R]
        largest, summed = np.maximum(worst[:q, q, None], inner), total[:q, q, None] + inner
        best = np.argmin(weights[0] * largest + weights[1] * summed, axis=0)
        chosen[q] = best
        most[q], added[q] = (np.take_along_axis(each, best[None], 0)[0] for each in (largest, summed))
    return most, added, chosen


def _traced(p: int, q: int, before: Sequence[NDArray[np.int64]]) -> tuple[int, ...]:
    """All full steps, from the last two and which was before each two."""
    found = [q, p]
    for chosen in reversed(before):
        p, q = int(chosen[p, q]), p
        found.append(p)
    return tuple(reversed(found))


def tables(gram: Array, weights: Array) -> dict[str, dict[int, tuple[int, ...]]]:
    """For each kind of schedule, the full steps of each number up to half of all steps; {} where there are too many
    steps, or fewer than four."""
    steps = len(gram)
    if not 4 <= steps <= MOST_STEPS:
        return {}
    found = costs(gram / max(float(np.trace(gram)), 1e-30), weights)
    return {kind: schedules(found, -(-steps // 2), chosen) for kind, chosen in WEIGHTS.items()}
