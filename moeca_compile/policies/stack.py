"""Stack caching: the residual of the whole block stack, h_L - h_0; a cache step is embedding + residual + head.

Of each stream that the output comes from, where there are several.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, fx

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.analysis.axis import place_in
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.step import ATTENTION, CacheSpec, Step
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.plain import run_layers


class Stack:
    """The policy over the residual chain of one graph, from the streams h_0 before it to the streams h_L after it."""

    def __init__(self, config: MoecaConfig, regions: Regions) -> None:
        forecast = "stack" in config.forecast
        self.cached: dict[fx.Node, Cached] = {}
        for i, (first, last) in enumerate(regions.stacks):
            name = f"stack.{i}" if i else "stack"
            self.cached[first] = Cached(name, last, ATTENTION, forecast, config.cache_dtype)

    def specs(self) -> list[CacheSpec]:
        return [spec for cached in self.cached.values() for spec in cached.specs()]

    def install(self, step: Step) -> StackStep:
        return StackStep(self, step)


class StackStep:
    def __init__(self, policy: Stack, step: Step) -> None:
        self.policy, self.step = policy, step
        run_layers(step)
        if not step.kind.full:
            for first, cached in policy.cached.items():
                step.replacements[cached.node] = partial(self._reused, first, cached)

    def _reused(self, first: fx.Node, cached: Cached) -> Tensor:
        return self._before(first, cached.node) + cached.read(self.step)

    def _before(self, first: fx.Node, last: fx.Node) -> Tensor:
        """The tokens of `last` as they were before the first block."""
        regions = self.step.regions
        place = place_in(regions.axis(first), regions.axis(last)) or 0
        stream: Tensor = self.step[first]
        return stream[:, place : place + regions.layouts[last].tokens]

    def finish(self) -> None:
        if self.step.kind.full:
            for first, cached in self.policy.cached.items():
                cached.store(self.step, self.step[cached.node] - self._before(first, cached.node))
