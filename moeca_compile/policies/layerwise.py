"""Layer-wise caching: every block's attention and feed-forward outputs, reused with fresh gates (FORA).

With forecast, the outputs are extrapolated to first order instead of held (as TaylorSeer does at order 1).
"""

from __future__ import annotations

from functools import partial

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.step import ATTENTION, EXPERTS, CacheSpec, Step
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.plain import run_layers


class Layerwise:
    """The policy over one graph's residual branches."""

    def __init__(self, config: MoecaConfig, regions: Regions) -> None:
        self.regions = regions
        attentions = {a.residual for a in regions.attentions}
        self.cached: list[Cached] = []
        for i, residual in enumerate(regions.residuals):
            part, forecast = (ATTENTION, "attention") if residual in attentions else (EXPERTS, "experts")
            name = f"residual.{i}"
            self.cached.append(Cached(name, residual.output, part, forecast in config.forecast, config.cache_dtype))

    def specs(self) -> list[CacheSpec]:
        return [spec for cached in self.cached for spec in cached.specs()]

    def install(self, step: Step) -> LayerwiseStep:
        return LayerwiseStep(self, step)


class LayerwiseStep:
    """One step: cached branches replaced, or all of them kept."""

    def __init__(self, policy: Layerwise, step: Step) -> None:
        self.policy, self.step = policy, step
        run_layers(step)
        for cached in policy.cached:
            if not self._fresh(cached):
                step.replacements[cached.node] = partial(cached.read, step)

    def _fresh(self, cached: Cached) -> bool:
        kind = self.step.kind
        return kind.attention if cached.part == ATTENTION else kind.experts

    def finish(self) -> None:
        for cached in self.policy.cached:
            if self._fresh(cached):
                cached.store(self.step, self.step[cached.node])
