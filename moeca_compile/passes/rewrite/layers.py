"""Run the MoE layers behind markers: all branches of a layer, or of chosen tokens, weighted and summed."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx

from moeca_compile.passes.analysis.graph import between, shape_of
from moeca_compile.passes.rewrite.rows import Rows
from moeca_compile.passes.rewrite.step import Step


def layer_output(step: Step, marker: fx.Node) -> Tensor:
    """The layer's output (T, width), with every branch computed and nothing cached (paper, eq. 6)."""
    inputs = [step[node] for node in step.regions.bodies[marker].rows]
    return _combined(step, marker, inputs, *(step[node] for node in _routing(marker)))


def rows_through_layers(step: Step, chosen: Tensor, source: fx.Node, output: fx.Node) -> Rows:
    """`Step.rows`, with the MoE layers between `source` and `output` run on the chosen tokens too.

    A layer runs all branches of these tokens. Where experts choose among all tokens, they still do, and the chosen
    tokens take their share of it.
    """
    inside = between(source, [output]) & step.regions.bodies.keys()
    return step.rows(chosen, source, output, {marker: partial(_layer_rows, step, marker) for marker in inside})


def _layer_rows(step: Step, marker: fx.Node, rows: Rows) -> Tensor:
    """The layer's output (B * C, width) on the chosen tokens of `rows`."""
    like = marker.args[0]
    assert isinstance(like, fx.Node)
    inputs = [rows.aligned(node, like) for node in step.regions.bodies[marker].rows]
    return _combined(step, marker, inputs, *rows.of(*_routing(marker)))


def _routing(marker: fx.Node) -> list[fx.Node]:
    """The choice and the weights of a layer's router."""
    return [node for node in marker.args[1:3] if isinstance(node, fx.Node)]


def _combined(step: Step, marker: fx.Node, inputs: list[Tensor], choice: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight * output over the branches of each row of `inputs`: (rows, width)."""
    if marker.target is torch.ops.moeca.experts_fixed_k.default:
        return combine(run_fixed_k(step, marker, choice, inputs), weight)
    body = step.regions.bodies[marker]
    parameters, width = [step[node] for node in body.parameters], shape_of(marker)[-1]
    out: Tensor = torch.ops.moeca.variable_k_outputs(inputs, choice, weight, None, parameters, body.key, width, 0)[0]
    return out


def run_fixed_k(step: Step, marker: fx.Node, index: Tensor, inputs: list[Tensor] | None = None) -> Tensor:
    """The branches of a layer whose tokens have these experts (T, k): (T, k, width), before weighting.

    `inputs` are those of the experts, by default for all tokens.
    """
    body = step.regions.bodies[marker]
    out: Tensor = torch.ops.moeca.fixed_k_outputs(
        inputs if inputs is not None else [step[node] for node in body.rows],
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
