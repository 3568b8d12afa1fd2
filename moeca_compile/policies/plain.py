"""No cache at all: the model captured, its MoE layers lowered, and nothing else. The honest base line."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx

from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.step import CacheSpec, Step, combine, run_experts


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
    choice, weight = marker.args[1:3]
    assert isinstance(choice, fx.Node) and isinstance(weight, fx.Node)
    if marker.target is torch.ops.moeca.experts_fixed_k.default:
        return combine(run_experts(step, marker), step[weight])
    body = step.regions.bodies[marker]
    rows, parameters = ([step[node] for node in nodes] for nodes in (body.rows, body.parameters))
    width, routing = shape_of(marker)[-1], (step[choice], step[weight])
    out: Tensor = torch.ops.moeca.variable_k_outputs(rows, *routing, parameters, body.key, width, 0)[0]
    return out
