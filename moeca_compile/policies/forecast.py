"""Forecasts: a cached value extrapolated along the timestep, as a weighted sum of its values at the last full steps.

The weights come from the host, so that one compiled step serves all distances, and another rule needs no other step:
it is a function of when the full steps were. A rule with K slots keeps the values of the last K full steps.

Below, t_0, t_1, ... are the last full steps before a cache step at t, the newest first, and y_0, y_1, ... the values
there. All rules give a constant value back as it is, so weights sum to 1: that of y_0 is what the others leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from moeca_compile.options import Options

Older = Callable[[Sequence[float], float], Sequence[float]]
"""([t_0, t_1, ...] all different, t) -> the weights of y_1, y_2, ..."""


@dataclass(frozen=True)
class Rule:
    """How values are extrapolated.

    Attributes:
        order: the degree of the polynomial in t that the forecast is where there are enough full steps.
        older: the weights.
        slots: K, how many full steps a forecast reads at most.
        by_number: whether steps count by their numbers, as if all took the same time, or by their times.
        slope: how much of the change beyond y_0 is believed, from 0 to 1.
    """

    order: int
    older: Older
    slots: int
    by_number: bool = False
    slope: float = 1.0

    def weights(self, at: Sequence[float], now: float) -> list[float]:
        """The weights of the values at `at`, the newest first. Of those at one time all but the newest have none."""
        places = [i for i, when in enumerate(at) if when not in at[:i]]
        found = [0.0] * len(at)
        for i, weight in zip(places[1:], self.older([at[i] for i in places], now), strict=True):
            found[i] = self.slope * weight
        found[0] = 1.0 - math.fsum(found)
        return found


# --- the rules ----------------------------------------------------------------------------------------------------


def polynomial(at: Sequence[float], now: float) -> list[float]:
    """Lagrange's weights: the polynomial through all values. Of two, the straight line.

    This is Taylor's series with divided differences for derivatives, in Newton's form, and is exact for polynomials
    however uneven steps are. TaylorSeer's own differences are not: `taylorseer`.
    """
    return [math.prod((now - b) / (a - b) for b in at if b != a) for a in at[1:]]


def taylorseer(at: Sequence[float], now: float) -> list[float]:
    """TaylorSeer (Liu et al. 2025, arXiv 2503.06923), as its code has it.

    At each full step F_0 = y and F_(i+1) = (F_i - F_i of the full step before) / (steps between the two). A cache
    step x steps later gives the sum of F_i x^i / i!. Beyond the straight line that is not the polynomial through the
    values: a difference of differences is divided by the last gap alone, and x^i takes the place of Newton's
    (t - t_0) (t - t_1) ...: for even gaps h the second order lacks x h / 2 times F_2.
    """
    return _series(at, now, lambda x, i: x**i)


SIGMA = math.sqrt(0.5)
"""Hermite's scale. The first order is 2 sigma^2 x, so this one leaves a straight line as it is, and damps the orders
beyond."""


def hermite(at: Sequence[float], now: float) -> list[float]:
    """HiCache (2025, arXiv 2508.16984): TaylorSeer with sigma^i H_i(sigma x) in place of x^i.

    H_i are the physicists' Hermite polynomials. They depend on the unit of x, which is a step.
    """
    return _series(at, now, lambda x, i: SIGMA**i * hermite_polynomial(SIGMA * x, i))


def hermite_polynomial(x: float, order: int) -> float:
    """H_0 = 1, H_1 = 2 x, H_(i+1) = 2 x H_i - 2 i H_(i-1)."""
    before, value = 0.0, 1.0
    for i in range(order):
        before, value = value, 2 * x * value - 2 * i * before
    return value


def adams_bashforth(at: Sequence[float], now: float) -> list[float]:
    """The value as the solution of an ODE, whose right-hand side at t_i is (y_i - y_(i+1)) / (t_i - t_(i+1)).

    The polynomial through these slopes is integrated from t_0 to t. To second order this is TaylorSeer's rule, by
    times.
    """
    slopes = [0.0, *(_integral(at[:-1], a, at[0], now) / (a - b) for a, b in pairwise(at)), 0.0]
    return [slopes[i + 1] - slopes[i] for i in range(1, len(at))]


RIDGE = 1e-3
"""How much the squares of Chebyshev coefficients count beside squared errors."""


def chebyshev(order: int, at: Sequence[float], now: float) -> list[float]:
    """A least-squares fit of Chebyshev polynomials T_0 to T_order, with a ridge penalty (as Spectrum's).

    The time from the oldest value to this step is scaled to [-1, 1]. T_0 is not penalized, as is usual for the
    constant term of a ridge fit, so that a constant value is not drawn toward 0.
    """
    degree, width = min(order, len(at) - 1), now - at[-1]
    if not width:
        return [0.0] * (len(at) - 1)
    places = torch.tensor([2 * (when - at[-1]) / width - 1 for when in (*at, now)], dtype=torch.float64, device="cpu")
    terms = torch.cos(torch.arange(degree + 1, device="cpu") * torch.arccos(places.clamp(-1, 1))[:, None])
    known, wanted = terms[:-1], terms[-1]
    penalty = torch.full((degree + 1,), RIDGE, dtype=torch.float64, device="cpu")
    penalty[0] = 0.0
    weights: list[float] = (known @ torch.linalg.solve(known.T @ known + penalty.diag(), wanted)).tolist()
    return weights[1:]


def _series(at: Sequence[float], now: float, term: Callable[[float, int], float]) -> list[float]:
    """The weights in the sum over i of F_i term(x, i) / i! (`taylorseer`)."""
    found = [0.0] * len(at)
    rows = [[float(i == j) for j in range(len(at))] for i in range(len(at))]  # F_0 at each full step
    for i in range(len(at)):
        factor = term(now - at[0], i) / math.factorial(i)
        found = [weight + factor * part for weight, part in zip(found, rows[0], strict=True)]
        rows = [
            [(new - old) / (at[j] - at[j + 1]) for new, old in zip(rows[j], rows[j + 1], strict=True)]
            for j in range(len(rows) - 1)
        ]
    return found[1:]


def _integral(nodes: Sequence[float], node: float, start: float, end: float) -> float:
    """The integral of the polynomial that is 1 at `node` and 0 at the other nodes; of degree 3 at most."""

    def value(at: float) -> float:
        return math.prod((at - other) / (node - other) for other in nodes if other != node)

    return (end - start) / 6 * (value(start) + 4 * value((start + end) / 2) + value(end))  # Simpson's rule


FORECASTERS: dict[str, Callable[[int], Rule]] = {
    "taylor": lambda order: Rule(order, polynomial, order + 1),
    "taylorseer": lambda order: Rule(order, taylorseer, order + 1, by_number=True),
    "hermite": lambda order: Rule(order, hermite, order + 1, by_number=True),
    "adams-bashforth": lambda order: Rule(order, adams_bashforth, order + 1),
    "chebyshev": lambda order: Rule(order, partial(chebyshev, order), 2 * order + 1),  # a fit needs more than it fits
}
"""The rule of each forecaster, of a given order."""

HALF = 0.5
"""How much of the slope is believed where there is fresh noise at every step: it is in both of the last values."""

LINEAR = FORECASTERS["taylor"](1)


@lru_cache
def _rule(forecaster: str, order: int, slope: float) -> Rule:
    rule = FORECASTERS[forecaster](order)
    return Rule(rule.order, rule.older, rule.slots, rule.by_number, slope)


def rule_of(options: Options, noisy: bool = False) -> Rule:
    """The rule of every forecast under these options; `noisy` where the sampler's noise is in what is forecast."""
    slope = min(options.forecast_slope, HALF) if noisy else options.forecast_slope
    return _rule(options.forecaster, options.forecast_order, slope)


def slots_of(options: Options, group: str) -> int:
    """How many slots the cached values of a group (a name that the option `forecast` takes) have."""
    return rule_of(options).slots if group in options.forecast else 1


# --- the weights of slots -----------------------------------------------------------------------------------------


def slot_weights(rule: Rule, at: Sequence[float], filled: int, now: float) -> list[list[float]]:
    """(K, K) weights of a part's slots; row h - 1 is for values that the last h full steps computed.

    Where there were fewer than h, the row is that of all there were. Weights are in the order of the slots, so that a
    compiled step need not know which is the newest.

    Args:
        rule: the forecast.
        at: when the part's last full steps were, the newest first: K at most.
        filled: how many there were in all. Each filled the slot after that of the one before, from 0.
        now: when this step is.
    """
    rows = [[0.0] * rule.slots for _ in range(rule.slots)]
    for row, weights in zip(rows, _by_history(rule, tuple(at), now) if at else (), strict=False):
        for age, weight in enumerate(weights):
            row[(filled - 1 - age) % rule.slots] = weight
    return rows


@lru_cache(1024)
def _by_history(rule: Rule, at: tuple[float, ...], now: float) -> list[list[float]]:
    """The weights of values that the last 1, 2, ... K full steps computed. Generations have the same times."""
    return [rule.weights(at[:known], now) for known in range(1, rule.slots + 1)]


def weights_after_one(slots: int, device: torch.device) -> Tensor:
    """(2, K, K) weights after one full step, which filled the first slot of each ring."""
    weights = torch.zeros(2, slots, slots, device=device)
    weights.select(-1, 0).fill_(1.0)
    return weights
