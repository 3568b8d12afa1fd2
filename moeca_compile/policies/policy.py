"""A policy: its recipes, the options that it uses, and the replacements that it declares for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeca_compile.options import SCHEDULES, WITH_EXPONENT, Options
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.policies.criterion import Decides

ALWAYS = frozenset(
    {"validate", "tolerance", "cuda_graphs", "lowering", "disk_cache", "background", "progress", "dump", "tuned"}
    | {"dynamic_batch", "max_shapes"}
)
"""Options that every recipe uses."""
FORECASTING = frozenset({"forecast", "forecaster", "forecast_order", "forecast_slope"})
"""Options of recipes that may extrapolate what is cached."""
SPACED = frozenset({"full_every", "full_steps", "schedule", "schedule_exponent", "warmup_steps"})
"""Options of recipes whose full steps come by their numbers."""
KEEPING = ALWAYS | {
    "max_generations",
    "cache_dtype",
    "max_cache_bytes",
    "coarser_caches",
    "check_inputs",
    "corrector",
    "trace",
}
"""Options that every recipe with caches uses."""
CACHING = KEEPING | SPACED | FORECASTING | {"max_error"}
"""Options of recipes whose full steps come by their numbers, and that may extrapolate."""
DECIDING = KEEPING | {"reuse_threshold", "max_reused"}
"""Options of recipes that decide by the data which steps are full."""


def _nothing_ignored(options: Options) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True)
class CacheStepAt:
    """Where a cache step stands in its generation.

    Attributes:
        number: from 0.
        steps: how many steps the generation is expected to have; None where that is not known.
        since: how many steps ago a step computed something anew last, from 1.
    """

    number: int
    steps: int | None
    since: int


def _one_group(options: Options, at: CacheStepAt) -> str:
    return ""


def _weighs_age(options: Options) -> bool:
    return options.score == "staleness"


@dataclass(frozen=True)
class Policy:
    """One way of caching.

    Attributes:
        reuses: what a cache step reuses, in a few words for the docs.
        recipes: the names of its recipes, each with its default values of options.
        options: the options that it uses; setting any other is a ConfigError.
        declare: returns the replacements for the regions of a model; empty where it can cache nothing.
        forecasts: the groups of caches that can be forecast (allowed values of the option `forecast`).
        needs: what a model must have, in words that a warning shows.
        applies: whether the regions have what the policy needs.
        caches: whether it caches anything in any model.
        stands_in: whether it may take the place of another whose caches are too large: its cache steps are as cheap.
        decides: how it decides by the data which steps are full; None where step numbers do (runtime.schedule).
        ignored: returns options that have no effect because of another option's value, each with the reason.
        group_at: returns the group of replacements (`Replacement.group`) that a cache step uses; "" where there is
            one.
        share_at: returns the share of the tokens that a cache step recomputes, where step numbers say that; the step
            reads it from `kinds.STEP_SCALARS`, which must be among the caches. None where the data say it, or
            nothing is recomputed.
        weighs_age: whether something is weighed by its age in units of full_every.
    """

    reuses: str
    recipes: Mapping[str, Mapping[str, Any]]
    options: frozenset[str]
    declare: Callable[[Options, Regions], Sequence[Replacement]]
    forecasts: tuple[str, ...] = ()
    needs: str = "attention or feed-forwards around a residual stream"
    applies: Callable[[Regions], bool] = lambda regions: True
    caches: bool = True
    stands_in: bool = True
    decides: Decides | None = None
    ignored: Callable[[Options], Mapping[str, str]] = _nothing_ignored
    group_at: Callable[[Options, CacheStepAt], str] = _one_group
    share_at: Callable[[Options, CacheStepAt], float] | None = None
    weighs_age: Callable[[Options], bool] = _weighs_age


def ignored_by_all(options: Options, policy: Policy) -> Mapping[str, str]:
    """Options without effect because of another option's value, whatever the policy."""
    found: dict[str, str] = {}
    spaced = {"schedule"} | ({"full_every"} if not policy.weighs_age(options) else set())  # it counts in such steps
    if options.full_steps:
        listed = "full_steps lists the full steps, so it has no effect"
        found |= dict.fromkeys({*spaced, "warmup_steps", "max_error"}, listed)
    if options.schedule not in SCHEDULES:
        found["warmup_steps"] = "the schedule lists the full steps, so it has no effect"
    if options.schedule not in WITH_EXPONENT:
        found["schedule_exponent"] = 'it is for schedule="power" and "tapered", so it has no effect'
    if not options.forecast_order:
        found |= dict.fromkeys(("forecaster", "forecast_slope"), "order 0 holds the last value, so it has no effect")
    if not options.forecast:
        names = ("forecaster", "forecast_order", "forecast_slope")
        found |= dict.fromkeys(names, "nothing is forecast, so it has no effect")
    if options.attention_every or options.experts_every:
        together = "it needs full steps that refresh attention and experts together"
        found |= dict.fromkeys(("corrector", "max_error"), together)
        found["warmup_steps"] = "attention_every and experts_every count from the first step on"
    if options.attention_every and options.experts_every:
        reason = "attention_every and experts_every take its place, so it has no effect"
        found |= dict.fromkeys({"full_steps", *spaced}, reason)
    if options.sampler == "stochastic":
        found["max_error"] = "it is for deterministic samplers: the noise of others is in the error that it looks at"
    if options.max_cache_bytes is None:
        found["coarser_caches"] = "max_cache_bytes sets no limit, so it has no effect"
    if not options.validate:
        found["tolerance"] = "nothing is validated, so it has no effect"
    return found
