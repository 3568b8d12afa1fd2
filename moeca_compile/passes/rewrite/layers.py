"""Run the MoE layers behind markers: all branches of a layer, weighted and summed."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.rewrite.step import Step


def layer_output(step: Step, marker: fx.Node) -> Tensor:
    """The layer's output (T, width), with every branch computed and nothing cached (paper, eq. 6)."""
    choice, weight = marker.args[1:3]
    assert isinstance(choice, fx.Node) and isinstance(weight, fx.Node)
    if marker.target is torch.ops.moeca.experts_fixed_k.default:
        return combine(run_fixed_k(step, marker, step[choice]), step[weight])
    body = step.regions.bodies[marker]
    rows, parameters = ([step[node] for node in nodes] for nodes in (body.rows, body.parameters))
    routing, width = (step[choice], step[weight]), shape_of(marker)[-1]
    out: Tensor = torch.ops.moeca.variable_k_outputs(rows, *routing, None, parameters, body.key, width, 0)[0]
    return out


def run_fixed_k(step: Step, marker: fx.Node, index: Tensor) -> Tensor:
    """The branches of a layer whose tokens have these experts (T, k): (T, k, width), before weighting."""
    body = step.regions.bodies[marker]
    out: Tensor = torch.ops.moeca.fixed_k_outputs(
        [step[node] for node in body.rows],
        index,
        [step[node] for node in body.parameters],
        body.experts,
        body.key,
        shape_of(marker)[-1],
    )
    return out


def combine(branches: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight * output over a token's branches (paper, eq. 6): (..., k, width), (..., k) -> (..., width)."""
    return (branches * weight.to(branches.dtype)[..., None]).sum(-2)
