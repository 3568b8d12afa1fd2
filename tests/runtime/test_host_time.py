"""What a call costs the host beside its kernels, counted in calls of functions, which no other process disturbs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moeca_compile.lower.program import CompiledStep
from moeca_compile.runtime.engine import Engine
from tests.harness import Captured, calls_of
from tests.models import TinyDiTMoE, make_inputs

pytestmark = pytest.mark.usefixtures("without_inductor")
STEPS = 8


def generation(graph: Captured, model: TinyDiTMoE) -> list[list[Any]]:
    """The inputs of each call."""
    x, y = make_inputs(model)
    return [graph.arguments(x=x, t=torch.full((2,), 1 - number / STEPS), y=y) for number in range(STEPS)]


def without_kernels(step: CompiledStep, inputs: list[Any], state: dict[str, Tensor]) -> CompiledStep:
    """The compiled step, with code that returns what it returned once."""
    results = step.code(*step.traced.inputs(inputs, state, torch.zeros(2, 2)))
    return replace(step, code=lambda *tensors: results)


def prepared(engine: Engine, calls: list[list[Any]]) -> Engine:
    """An engine that has run a generation, and from now on runs no kernels."""
    for inputs in calls:
        engine(*inputs)
    loop = engine.loop_for(calls[0])
    for kind, step in loop.steps.items():
        streams = loop.streams.held()
        loop.steps[kind] = without_kernels(step, calls[0], streams[0].state if streams else {})
    return engine


@pytest.mark.parametrize(("recipe", "most"), [("none", 66), ("stack", 300)])
def test_a_step_calls_few_functions(graph, model, recipe, most):
    """Fewer than it has weights and arguments for `none`: what is done for each of them would be seen."""
    calls = generation(graph, model)
    engine = prepared(graph.engine(recipe=recipe), calls)
    counts = [calls_of(lambda inputs=inputs: engine(*inputs)) for inputs in calls]
    assert 0 < max(counts) <= most
    assert len(calls[0]) > 90
