"""The experts' tensors are read without tracing through their modules, and still as they are at each call."""

from __future__ import annotations

import pytest
import torch

from tests.capture.layers import NumpyEnds, stack, swiglu_with_bias, tokens
from tests.harness import RecordingBackend, nodes_of
from tests.references import run_with_markers


def params_of_layer(backend: RecordingBackend) -> list[torch.Tensor]:
    """The tensors in the marker's list, of the last graph."""
    gm, inputs = backend.graphs[-1], backend.inputs[-1]
    value = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    (layer,) = nodes_of(gm, torch.ops.moeca.experts_fixed_k)
    return [value[node] for node in layer.args[4]]


@pytest.mark.parametrize("change", ["parameter", "module"])
def test_an_expert_that_is_exchanged_is_seen_at_the_next_call(change: str):
    model, x = stack(NumpyEnds()), tokens()
    backend = RecordingBackend(run=lambda gm: lambda *inputs: run_with_markers(gm, inputs))
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(x)
        experts = model[0].moe.experts
        if change == "parameter":
            first = next(iter(experts[2].parameters()))
            owner = next(m for m in experts[2].modules() if any(p is first for p in m._parameters.values()))
            name = next(n for n, p in owner._parameters.items() if p is first)
            owner._parameters[name] = torch.nn.Parameter(torch.randn_like(first))
        else:
            experts[2] = type(model[0].moe)().experts[0].eval()
        torch.testing.assert_close(compiled(x), model(x))
    assert len(backend.graphs) == 1


def test_an_expert_of_another_class_is_traced_anew():
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model, x = stack(NumpyEnds(2, swiglu_with_bias)), tokens()
    backend = RecordingBackend(run=lambda gm: lambda *inputs: run_with_markers(gm, inputs))
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(x)
        expert = model[0].moe.experts[2]
        name, old = next((n, m) for n, m in expert.named_children() if type(m) is torch.nn.Linear)
        other = Doubled(old.in_features, old.out_features)
        other.load_state_dict(old.state_dict())
        setattr(expert, name, other.eval())
        torch.testing.assert_close(compiled(x), model(x))
    assert len(backend.graphs) > 1


def test_parameters_that_experts_share_are_listed_for_each():
    model, x = stack(NumpyEnds()), tokens()
    experts = model[0].moe.experts
    experts[3].load_state_dict(experts[1].state_dict())
    for tied, own in zip(experts[3].modules(), experts[1].modules(), strict=True):
        tied._parameters.update(own._parameters)
    backend = RecordingBackend(run=lambda gm: lambda *inputs: run_with_markers(gm, inputs))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    wanted = [tensor for expert in experts for tensor in expert.parameters()]
    assert [a is b for a, b in zip(params_of_layer(backend), wanted, strict=True)] == [True] * len(wanted)
