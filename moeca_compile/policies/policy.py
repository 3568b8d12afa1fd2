"""A policy: its recipes, the options that it uses, and the replacements that it declares for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeca_compile.options import Options
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.replacement import Replacement

ALWAYS = frozenset(
    {"validate", "tolerance", "cuda_graphs", "lowering", "disk_cache", "progress", "dump", "max_shapes"}
)
"""Options that every recipe uses."""
CACHING = (
    ALWAYS
    | {"full_every", "full_steps", "schedule", "schedule_exponent", "corrector", "forecast", "forecast_slope"}
    | {"max_generations", "cache_dtype", "max_cache_bytes", "coarser_caches", "check_inputs", "trace"}
)
"""Options that every recipe with caches uses."""


def _nothing_ignored(options: Options) -> Mapping[str, str]:
    return {}


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
        ignored: returns options that have no effect because of another option's value, each with the reason.
    """

    reuses: str
    recipes: Mapping[str, Mapping[str, Any]]
    options: frozenset[str]
    declare: Callable[[Options, Regions], Sequence[Replacement]]
    forecasts: tuple[str, ...] = ()
    needs: str = "attention or feed-forwards around a residual stream"
    applies: Callable[[Regions], bool] = lambda regions: True
    caches: bool = True
    ignored: Callable[[Options], Mapping[str, str]] = _nothing_ignored


def ignored_by_all(options: Options) -> Mapping[str, str]:
    """Options without effect because of another option's value, whatever the policy."""
    found: dict[str, str] = {}
    spaced = {"schedule"} | ({"full_every"} if options.score != "staleness" else set())  # it counts in such steps
    if options.full_steps:
        found |= dict.fromkeys(spaced, "full_steps lists the full steps, so it has no effect")
    if options.schedule == "uniform":
        found["schedule_exponent"] = 'it is for schedule="power", so it has no effect'
    if not options.forecast:
        found["forecast_slope"] = "nothing is forecast, so it has no effect"
    if options.attention_every or options.experts_every:
        found["corrector"] = "it needs full steps that refresh attention and experts together"
    if options.attention_every and options.experts_every:
        reason = "attention_every and experts_every take its place, so it has no effect"
        found |= dict.fromkeys({"full_steps", *spaced}, reason)
    if options.max_cache_bytes is None:
        found["coarser_caches"] = "max_cache_bytes sets no limit, so it has no effect"
    if not options.validate:
        found["tolerance"] = "nothing is validated, so it has no effect"
    return found
