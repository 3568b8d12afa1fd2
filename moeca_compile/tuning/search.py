"""Which candidates are tried, and which of them is taken. Each builds on what the last ones showed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from moeca_compile.config import MoecaConfig
from moeca_compile.options import ConfigError
from moeca_compile.policies import RECIPES
from moeca_compile.tuning.calibrate import WEIGHTS
from moeca_compile.tuning.measure import Candidate, Measure
from moeca_compile.tuning.rows import Row
from moeca_compile.tuning.wish import Wish

_PROBES = 5
"""So many numbers of full steps are tried until the wish is just met."""
_DB_OF_TWICE = 6.0
"""About how much PSNR twice as many full steps add (docs/policies.md)."""
STOCHASTIC = ("half slope, no corrector", {"corrector": False, "forecast_slope": 0.5})
NARROW = ("bfloat16 caches", {"cache_dtype": "bfloat16"})
_USUAL: str = RECIPES["auto"].recipes["auto"]["schedule"]
"""The schedule of the default candidate."""
_BESIDE = (0.6, 1.6)
"""The number of full steps of two more rows of the frontier, as multiples of that of the best row."""


@dataclass(frozen=True)
class Found:
    """The outcome: the row that is taken, the default candidate's, and whether the wish is met."""

    chosen: Row
    default: Row
    met: bool
    kind: str | None
    """The better kind of calibrated schedules; None where there are none."""


class NothingCachedError(RuntimeError):
    """No recipe could cache anything in this model, or gave outputs to compare; the message has the reasons."""


def search(measure: Measure, wish: Wish, recipes: Sequence[str]) -> Found:
    """Measure candidates, and take the best that meets the wish and holds up on the seeds that were held back.

    Where nothing that meets the wish holds up, the best that meets it is taken; where nothing meets it, the nearest.

    The default candidate is a forecast of the stack's change (or what else of `recipes` caches anything first),
    tapered schedule and corrector, as the recipe `auto` has them.

    Raises NothingCachedError where no recipe caches anything.
    """
    recipe, default = _default(measure, wish, recipes)
    best, row = Candidate(recipe, _USUAL, default.full_steps), default

    def try_(candidate: Candidate) -> None:
        nonlocal best, row
        found = measure.row(candidate)
        if (
            not found.note
            and found.quality > row.quality
            and (wish.is_quality or wish.meets(found) or not wish.meets(row))
        ):
            best, row = candidate, found

    measure.row(replace(best, schedule="uniform"))
    try_(replace(best, schedule="power"))
    kinds = [kind for kind in WEIGHTS if best.full in measure.tables.get(kind, {})]
    for kind in kinds:
        try_(replace(best, schedule=kind))
    for more in (STOCHASTIC, NARROW):
        candidate = replace(best, more=(*best.more, more))
        if _has_effect(measure, candidate):
            try_(candidate)
    _fitting(measure, wish, lambda full: _with(measure, best, full), best.full)
    for other in recipes[recipes.index(recipe) + 1 :]:
        if _has_effect(measure, replace(best, recipe=other)):
            measure.row(replace(best, recipe=other))
    for factor in _BESIDE:
        full = min(max(2, round(factor * best.full)), measure.steps - 1)
        measure.row(_with(measure, best, full))
    tried = {kind: measure.row(Candidate(recipe, kind, default.full_steps)) for kind in kinds}
    rated = {kind: row.quality for kind, row in tried.items() if not row.note}
    better = max(rated, key=lambda each: rated[each]) if rated else None
    return _taken([row for row in measure.store.asked.values() if not row.note], default, wish, better)


def _taken(rows: Sequence[Row], default: Row, wish: Wish, kind: str | None) -> Found:
    """The best row that meets the wish and holds up; the nearest to the wish where none meets it."""
    meeting = sorted((row for row in rows if wish.meets(row)), key=wish.merit, reverse=True)
    if not meeting:
        return Found(min(rows, key=wish.shortfall), default, False, kind)
    holding = [row for row in meeting if row is default or wish.holds_up(row, default)]
    # The default candidate may itself miss the wish: what meets it is taken all the same.
    return Found((holding or meeting)[0], default, True, kind)


def _default(measure: Measure, wish: Wish, recipes: Sequence[str]) -> tuple[str, Row]:
    """The recipe that caches anything, and the row of the default candidate at the number of full steps that fits."""
    reasons = []
    start = measure.steps / wish.value if wish.kind == "speedup" else measure.steps / 4
    for recipe in recipes:
        hint = min(max(2, round(start)), measure.steps - 1)
        first = measure.row(Candidate(recipe, _USUAL, hint))
        if not first.note:
            return recipe, _fitting(measure, wish, partial(Candidate, recipe, _USUAL), hint)
        reasons.append(f"{recipe}: {first.note}")
    raise NothingCachedError("no recipe can be used with this model. " + "; ".join(reasons))


def _fitting(measure: Measure, wish: Wish, make: Callable[[int], Candidate], full: int) -> Row:
    """The row with the number of full steps that just meets the wish, found by a few probes from `full` on.

    That is the most for a wish of speed, the fewest for one of quality. The nearest where none meets it. The first
    probe must be one that can be chosen.
    """
    low, high, rows = 0, measure.steps, []
    for _ in range(_PROBES):
        row = measure.row(make(full))
        rows.append(row)
        if not row.note and wish.meets(row) is wish.is_quality:
            high = min(high, full)
        else:
            low = max(low, full)
        if high - low <= 1:
            break
        full = min(max(_predicted(row, wish, measure.steps), low + 1), high - 1)
    usable = [row for row in rows if not row.note]
    meeting = [row for row in usable if wish.meets(row)]
    if not meeting:
        return min(usable, key=wish.shortfall)
    return (min if wish.is_quality else max)(meeting, key=lambda row: row.full_steps)


def _predicted(row: Row, wish: Wish, steps: int) -> int:
    """The number of full steps that should just meet the wish, from one row."""
    if wish.is_quality:
        return math.ceil(row.full_steps * 2 ** ((wish.value - row.psnr) / _DB_OF_TWICE))
    uncached = row.uncached_seconds
    each = (uncached - row.seconds) / (steps - row.full_steps)  # what a cache step saves
    if each <= 0:
        return 1
    return math.floor(row.full_steps + (wish.seconds(uncached) - row.seconds) / each)


def _with(measure: Measure, candidate: Candidate, full: int) -> Candidate:
    """The candidate with another number of full steps; by the usual schedule where none was calibrated for it."""
    known = candidate.schedule not in measure.tables or full in measure.tables[candidate.schedule]
    return replace(candidate, full=full, schedule=candidate.schedule if known else _USUAL)


def _has_effect(measure: Measure, candidate: Candidate) -> bool:
    """Whether the recipe heeds what a candidate has more, and the user has not decided on that."""
    if any(set(more) & set(measure.options) for _, more in candidate.more):
        return False
    try:
        MoecaConfig.from_options(measure.options_of(candidate))
    except ConfigError:
        return False
    return True
