"""A feed-forward or MoE layer of which cache steps recompute chosen tokens: what is cached of it, and its scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moeca_compile.options import Options
from moeca_compile.passes.analysis.axis import Layout
from moeca_compile.passes.match.regions import Experts, Residual
from moeca_compile.passes.rewrite.kinds import STEP_SCALARS, CacheSpec, Part, Role
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies import decision as decide
from moeca_compile.policies import token_scores as score
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.token_scores import TokenStatistic


@dataclass(frozen=True)
class TokenLayer:
    """One layer.

    Attributes:
        residual: the residual branch that it is.
        layout: of its output.
        cached: its output.
        age: name of (B, N) how many steps ago each token was computed.
        statistics: those of attentions that rank its tokens, each with the offset of these tokens in it.
        depth: how many layers a token has passed before.
        side: of the square that its tokens fill in the picture; 0 where they do not.
        experts: the MoE layer, where it is one.
    """

    residual: Residual
    layout: Layout
    cached: Cached
    age: str
    statistics: tuple[tuple[TokenStatistic, int], ...]
    depth: int
    side: int
    experts: Experts | None

    def specs(self) -> list[CacheSpec]:
        shape = (self.layout.samples, self.layout.tokens)
        ages = CacheSpec(self.age, shape, torch.float32, Role.STATISTIC, Part.EXPERTS, self.age)
        return [*self.cached.specs(), ages]

    def reads(self) -> list[fx.Node]:
        return self.cached.reads()

    def store(self, step: Step) -> None:
        self.cached.store(step)
        shape = (self.layout.samples, self.layout.tokens)
        step.updates[self.age] = torch.zeros(shape, dtype=torch.float32, device=step.weights.device)

    def scores(self, step: Step, options: Options) -> Tensor:
        """(B, N), the higher the sooner a token is recomputed."""
        found = score.AGE * step.state[self.age] / options.full_every
        for statistic, offset in self.statistics:
            own = step.state[statistic.name][:, offset : offset + self.layout.tokens]
            found = found + score.normalized(own)
        return found

    def grow_older(self, step: Step, recomputed: Tensor) -> None:
        """Count a step for all tokens but those that were `recomputed` (B, N)."""
        step.updates[self.age] = torch.where(recomputed, 0.0, step.state[self.age] + 1)
        if step.observer is not None and self.experts is not None:
            step.observer.recomputed(self.experts.marker, recomputed, self._routed(step, self.experts))

    def _routed(self, step: Step, layer: Experts) -> Tensor:
        """(B, N, E) bool, which experts the router takes for each token."""
        choice: Tensor = step[layer.choice].reshape(self.layout.samples, self.layout.tokens, -1)
        return choice if layer.variable_k else decide.routed_by_expert(choice, layer.body.experts)


@dataclass(frozen=True)
class StepScalars:
    """The numbers of each step that the host writes (kinds.STEP_SCALARS): they need memory, and no step fills it.

    `node` is any value of the graph.
    """

    node: fx.Node

    def specs(self) -> list[CacheSpec]:
        return [STEP_SCALARS]

    def reads(self) -> list[fx.Node]:
        return [self.node]

    def store(self, step: Step) -> None:
        pass
