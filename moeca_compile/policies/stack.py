"""Stack caching: the residual of the whole block stack, h_L - h_0; a cache step is embedding + residual + head."""

from __future__ import annotations

from torch import Tensor

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.regions import Regions
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.plain import run_layers
from moeca_compile.policies.step import ATTENTION, CacheSpec, Step


class Stack:
    """The policy over the residual chain of one graph, from its first stream h_0 to its last h_L."""

    def __init__(self, config: MoecaConfig, regions: Regions) -> None:
        assert regions.stack is not None, "policy_for asks"
        self.first, self.last = regions.stack
        self.cached = Cached("stack", self.last, ATTENTION, "stack" in config.forecast, config.cache_dtype)

    def specs(self) -> list[CacheSpec]:
        return self.cached.specs()

    def install(self, step: Step) -> StackStep:
        return StackStep(self, step)


class StackStep:
    def __init__(self, policy: Stack, step: Step) -> None:
        self.policy, self.step = policy, step
        run_layers(step)
        if not step.kind.full:
            step.replacements[policy.last] = self._reused

    def _reused(self) -> Tensor:
        return self.step[self.policy.first] + self.policy.cached.read(self.step)

    def finish(self) -> None:
        if self.step.kind.full:
            policy = self.policy
            policy.cached.store(self.step, self.step[policy.last] - self.step[policy.first])
