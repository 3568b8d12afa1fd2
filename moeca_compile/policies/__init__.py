"""Policies: what a step takes from caches. To add one, write its file and name it in POLICIES."""

from __future__ import annotations

from moeca_compile.policies import (
    auto,
    block,
    block_cache,
    deepcache,
    delta,
    duca,
    layerwise,
    magcache,
    moeca,
    none,
    stack,
    teacache,
    toca,
)
from moeca_compile.policies.policy import Policy

POLICIES = (none, auto, moeca, layerwise, stack, block, deepcache, delta, toca, duca, teacache, block_cache, magcache)

RECIPES: dict[str, Policy] = {recipe: module.POLICY for module in POLICIES for recipe in module.POLICY.recipes}
"""The policy behind each recipe."""
