"""Policies: what is computed anew at a step and what comes from the cache, as plain PyTorch over regions."""

from __future__ import annotations

from typing import Protocol

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.step import CacheSpec, Step
from moeca_compile.policies.layerwise import Layerwise
from moeca_compile.policies.moeca import Moeca
from moeca_compile.policies.plain import Plain
from moeca_compile.policies.stack import Stack


class StepPolicy(Protocol):
    """What `install` returns: a step under way."""

    def finish(self) -> None:
        """Called after the step's graph has run: keep what is to be cached."""


class Policy(Protocol):
    """What is cached, and how a step uses it."""

    def specs(self) -> list[CacheSpec]:
        """All cached tensors."""

    def install(self, step: Step) -> StepPolicy:
        """Set the step's replacements; `finish` of the result is called after the graph has run."""


_BY_FAMILY: dict[str, type] = {"none": Plain, "moeca": Moeca, "fora": Layerwise, "stack": Stack}


def policy_for(config: MoecaConfig, regions: Regions) -> Policy:
    """The recipe's policy over these regions; the plain one where there is nothing that it could cache.

    Without experts there is no routing for `moeca` to go by, and without a stream that runs through all blocks
    there is no stack, so they leave such a model as it is.
    """
    missing = {"moeca": not regions.experts, "stack": not regions.stacks}
    if not regions.residuals or missing.get(config.family, False):
        return Plain(config, regions)
    return caching_policy(config, regions)


def caching_policy(config: MoecaConfig, regions: Regions) -> Policy:
    """The recipe's policy over these regions, whatever they are."""
    policy: Policy = _BY_FAMILY[config.family](config, regions)
    return policy
