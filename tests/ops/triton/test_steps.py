"""Whole steps of a model with the kernels in the ops' place: the outputs and the state of the ATen functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.library import _scoped_library

from examples.families import inputs_for, reduced
from moeca_compile.ops.markers import NAMESPACE
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import StepKind
from tests.harness import Captured, captured
from tests.models import TinyDiTMoE, make_inputs
from tests.ops.triton.cases import DEVICE, assert_within

pytest.importorskip("triton")
from moeca_compile.ops.triton import attention, fixed_k, variable_k

pytestmark = [
    pytest.mark.filterwarnings("error:moeca"),
    pytest.mark.skipif(DEVICE == "cuda", reason="the kernels are the ops there"),
]

ROUNDINGS = 200
"""Of float32, after four blocks: sums of some tens of terms in another order, and norms and softmaxes between."""

KERNELS = (
    fixed_k.fixed_k_outputs,
    fixed_k.fixed_k_outputs_into,
    fixed_k.refresh_fixed_k,
    attention.attend_rows,
    variable_k.variable_k_outputs,
    variable_k.refresh_variable_k,
)


@contextmanager
def kernels_on_the_cpu(called: set[str]) -> Iterator[None]:
    """The ops run as they do on CUDA; `called` collects the names of those that ran."""

    def noted(op: Any) -> Any:
        return lambda *args: called.add(op.__name__) or op(*args)

    with _scoped_library(NAMESPACE, "FRAGMENT") as library:
        for op in KERNELS:
            library.impl(op.__name__, noted(op), "CPU")
        yield


def steps(graph: Captured, seconds: list[Any], recipe: str) -> list[torch.Tensor]:
    """Outputs and state of a full step, and of a cache step on other inputs with room for half of the tokens."""
    loop = graph.loop(recipe=recipe, validate=False)
    state = Caches(loop.compiled.plan.caches, torch.device("cpu"))
    weights = torch.tensor([[1.0, 0.0], [1.5, -0.5]]).expand(2, -1, -1)
    full = loop.eager(StepKind(), graph.inputs, state, weights)
    state.store(full.updates)
    kind = StepKind(False, False, loop.compiled.plan.sizes[1] // 2)
    cached = loop.compiled.function(kind)(seconds, state, weights)  # writes into the state
    state.store(cached.updates)
    return [*full.outputs, *cached.outputs, *(state[name] for name in sorted(state))]


def assert_same_steps(graph: Captured, seconds: list[Any], recipe: str, expected: set[str]) -> None:
    with torch.no_grad():
        plain, called = steps(graph, seconds, recipe), set[str]()
        with kernels_on_the_cpu(called):
            found = steps(graph, seconds, recipe)
    assert called == expected
    for one, other in zip(found, plain, strict=True):
        assert_within(one, other, ROUNDINGS, torch.float32)


@pytest.mark.parametrize("recipe", ["moeca", "moeca-forecast"])
def test_token_choice(small_model: TinyDiTMoE, small_graph: Captured, recipe: str):
    noise, labels = make_inputs(small_model, seed=5)
    seconds = small_graph.arguments(x=noise, t=0.9 * torch.ones(len(noise)), y=labels)
    assert_same_steps(small_graph, seconds, recipe, {"fixed_k_outputs", "refresh_fixed_k", "attend_rows"})


@pytest.mark.slow
def test_expert_choice():
    """A layer of variable k, whose branches are counted by the data."""
    model = reduced("EC-DiT")
    graph = captured(model, *inputs_for(model))
    x, t, y = inputs_for(model, seed=5)
    seconds = graph.arguments(x=x, t=t - 20, y=y)
    assert_same_steps(graph, seconds, "moeca-forecast", {"variable_k_outputs", "refresh_variable_k", "attend_rows"})
