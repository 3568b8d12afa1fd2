"""Caches within the option `max_cache_bytes`: decided from the planned bytes, before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from moeca_compile.config import MoecaConfig
from moeca_compile.free_memory import free_bytes
from moeca_compile.notes import Notes
from moeca_compile.options import ConfigError
from moeca_compile.passes.match.regions import Regions
from moeca_compile.plan import cache_specs, probe_of, regions_that_pay, replacements_of
from moeca_compile.policies import RECIPES
from moeca_compile.text import binary_bytes

AUTO_SHARE = 0.5
"""With "auto", the share of the free memory that caches of one stream may take: most samplers have two streams."""

_NARROW = torch.bfloat16

_TOO_LARGE = "the caches of one stream need {planned}, more than max_cache_bytes allows ({limit}). "
_UNCACHED = "The model runs uncached, so sampling is no faster. Raise max_cache_bytes, free memory"

FITTED = _TOO_LARGE + (
    "So {change}, which needs {chosen}. To keep recipe {recipe!r} as it is, raise max_cache_bytes or free memory. "
    "With coarser_caches=False nothing is changed, and the model then runs uncached"
)
TOO_SMALL = _TOO_LARGE + "The least that could take their place (recipe {least_recipe!r}) needs {least}. " + _UNCACHED
FORBIDDEN = _TOO_LARGE + _UNCACHED + ", or allow coarser_caches"


@dataclass(frozen=True)
class _Candidate:
    """A config, and the bytes of the caches of one stream under it."""

    config: MoecaConfig
    nbytes: int


def config_that_fits(
    graph: fx.Graph, regions: Regions, config: MoecaConfig, device: torch.device, notes: Notes
) -> MoecaConfig:
    """The config, if the caches of one stream are no larger than `max_cache_bytes` allows.

    Else the config with a narrower dtype, at a coarser level of caching, or without caches: the first that fits.
    Warns with the figures.
    """
    limit = _limit(config, device)
    if limit is None or not config.policy.caches:
        return config
    wanted = _measured(graph, regions, config)
    if wanted.nbytes <= limit:
        return config
    others = _others(graph, regions, config) if config.coarser_caches else []
    chosen = next((each for each in others if each.nbytes <= limit), None)
    notes.warn(_warning(wanted, limit, chosen, others))
    return chosen.config if chosen else _as_recipe(config, "none")


def _warning(wanted: _Candidate, limit: int, chosen: _Candidate | None, others: Sequence[_Candidate]) -> str:
    least = min(others, key=lambda each: each.nbytes, default=wanted)
    text = FITTED if chosen else TOO_SMALL if others else FORBIDDEN
    return text.format(
        planned=binary_bytes(wanted.nbytes),
        limit=binary_bytes(limit),
        recipe=wanted.config.recipe,
        change=_change(wanted.config, chosen.config) if chosen else "",
        chosen=binary_bytes(chosen.nbytes) if chosen else "",
        least=binary_bytes(least.nbytes),
        least_recipe=least.config.recipe,
    )


def _limit(config: MoecaConfig, device: torch.device) -> int | None:
    if config.max_cache_bytes != "auto":
        return config.max_cache_bytes  # type: ignore[return-value]
    free = free_bytes(device)
    return None if free is None else int(AUTO_SHARE * free)


def _others(graph: fx.Graph, regions: Regions, config: MoecaConfig) -> list[_Candidate]:
    """What could take the config's place: itself with narrow caches, then recipes that cache less, the most first."""
    coarser = [_measured(graph, regions, other) for other in _recipes_like(config)]
    levels = sorted((each for each in coarser if each.nbytes), key=lambda each: -each.nbytes)
    found = [config, *(level.config for level in levels)]
    forms = [form for each in found for form in (each, *_narrowed(each))][1:]
    return [_measured(graph, regions, form) for form in forms]


def _measured(graph: fx.Graph, regions: Regions, config: MoecaConfig) -> _Candidate:
    paying = regions_that_pay(graph, regions, config)
    replacements = replacements_of(config, paying)
    specs = cache_specs(replacements, probe_of(config, paying, replacements))
    return _Candidate(config, sum(spec.nbytes for spec in specs))


def _narrowed(config: MoecaConfig) -> list[MoecaConfig]:
    """The config with narrow caches, unless the user chose their dtype."""
    return [replace(config, cache_dtype=_NARROW)] if config.cache_dtype is None else []


def _recipes_like(config: MoecaConfig) -> Iterator[MoecaConfig]:
    """For every other policy that caches, its recipe that forecasts if the config does, with the user's options.

    None that decides by the data: it would be slower or faster than what the user chose.
    """
    for policy in {id(policy): policy for policy in RECIPES.values()}.values():
        if policy.caches and policy.stands_in and policy.decides is None and policy is not config.policy:
            alike = [
                name for name, own in policy.recipes.items() if bool(own.get("forecast")) == bool(config.forecast)
            ]
            yield from (_as_recipe(config, name) for name in alike[:1])


def _as_recipe(config: MoecaConfig, recipe: str) -> MoecaConfig:
    """The config under another recipe, with all of its options that have an effect there."""
    made, common = MoecaConfig(recipe=recipe), config.policy.options & RECIPES[recipe].options - {"forecast"}
    for field in dataclasses.fields(config):
        if field.name in common:
            try:
                made = replace(made, **{field.name: getattr(config, field.name)})
            except ConfigError:  # without effect beside the others
                continue
    return made


def _change(config: MoecaConfig, other: MoecaConfig) -> str:
    """What the other config does instead, as a part of a sentence."""
    narrow = "" if other.cache_dtype is config.cache_dtype else " in bfloat16"
    if other.recipe == config.recipe:
        return f"they are kept{narrow}"
    return f"recipe {other.recipe!r} with caches{narrow or ' in the same dtype'} takes their place"
