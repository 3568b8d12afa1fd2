"""No cache at all: the model captured, its MoE layers lowered, and nothing else. The honest base line."""

from __future__ import annotations

from functools import partial

from torch import Tensor, fx

from moeca_compile.passes.regions import Regions
from moeca_compile.policies.step import CacheSpec, Step, combine, run_experts


class Plain:
    """The policy without cache."""

    def __init__(self, config: object, regions: Regions) -> None:
        self.regions = regions

    def specs(self) -> list[CacheSpec]:
        return []

    def install(self, step: Step) -> PlainStep:
        run_layers(step)
        return PlainStep()


class PlainStep:
    def finish(self) -> None:
        """Nothing is kept."""


def run_layers(step: Step) -> None:
    """Lower every MoE layer's marker to the op that runs all its branches."""
    for marker in step.regions.bodies:
        step.replacements.setdefault(marker, partial(_layer_output, step, marker))


def _layer_output(step: Step, marker: fx.Node) -> Tensor:
    return combine(run_experts(step, marker), step[marker.args[2]])  # type: ignore[index]
