"""Numbers that experts hold beside their tensors: one expert's code stands for all, so a change of any is noticed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from moeca_compile import capture
from moeca_compile.capture import wrapping
from moeca_compile.capture.python_values import held_by_experts
from tests.capture.inline_layers import BooleanMask, DenseSum
from tests.capture.layers import WIDTH, NumpyEnds, stack, tokens
from tests.harness import RecordingBackend, nodes_of
from tests.references import run_with_markers

LAYER = torch.ops.moeca.experts_fixed_k


class Adapted(nn.Module):
    """A product with what adapters hold: a scale by name, a flag behind a property, a list of what is merged."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(WIDTH, WIDTH)
        self.factor = 1.0
        self.scaling = {"one": 0.5}
        self.merged: list[str] = []
        self._switched_off = False

    @property
    def switched_off(self) -> bool:
        return self._switched_off

    def switch_off(self) -> None:
        self._switched_off = True

    def forward(self, x):
        y = self.product(x) * self.factor
        return y if self.switched_off or self.merged else y + x * self.scaling["one"]


CHANGES: dict[str, Any] = {
    "a number": lambda expert: setattr(expert, "factor", 2.0),
    "an entry of a dict": lambda expert: expert.scaling.update(one=3.0),
    "a list": lambda expert: expert.merged.append("one"),
    "a flag behind a property": lambda expert: expert.switch_off(),
}


def compiled(layer: nn.Module) -> tuple[nn.Module, Any, RecordingBackend]:
    model = stack(layer)
    backend = RecordingBackend(run=lambda gm: lambda *args: run_with_markers(gm, args))
    return model, torch.compile(model, backend=backend), backend


@pytest.mark.parametrize(("change", "changed"), [*((change, 2) for change in CHANGES), ("an entry of a dict", 0)])
def test_a_change_of_one_expert_is_noticed_and_the_original_runs(change, changed):
    model, run, backend = compiled(DenseSum(expert=Adapted, experts=3))
    with torch.no_grad():
        torch.testing.assert_close(run(tokens()), model(tokens()))
        assert len(nodes_of(backend.graphs[0], LAYER)) == 1 and capture.refusals() == ()
        CHANGES[change](model[0].moe.experts[changed])
        with pytest.warns(capture.CaptureWarning, match=r"built differently|not the sum"):
            torch.testing.assert_close(run(tokens()), model(tokens()))


@pytest.mark.parametrize("layer", [NumpyEnds, BooleanMask])
def test_a_change_of_all_experts_is_captured_again(layer):
    model, run, backend = compiled(layer(expert=Adapted, experts=3))
    with torch.no_grad():
        for change in (lambda expert: None, CHANGES["an entry of a dict"], CHANGES["a list"]):
            for expert in model[0].moe.experts:
                change(expert)
            torch.testing.assert_close(run(tokens()), model(tokens()))
    assert len(backend.graphs) == 3 and all(len(nodes_of(graph, LAYER)) == 1 for graph in backend.graphs)
    assert capture.refusals() == ()


def test_the_values_are_those_that_code_reads_and_no_forward_sets():
    class Counting(Adapted):
        def forward(self, x):
            self.factor = self.factor + 1  # as a counter of calls does
            return super().forward(x)

    for expert, names in ((Adapted, ["_switched_off", "factor", "merged", "scaling"]), (Counting, None)):
        layer = DenseSum(expert=expert, experts=3)
        held = held_by_experts(layer)
        assert [name for name, _ in held[0].values] == (names or ["_switched_off", "merged", "scaling"])
        assert len(held) == 3 and all(each.same() for each in held)
        layer.experts[1].scaling["two"] = 1.0
        assert [each.same() for each in held] == [True, False, True]
        del layer
        assert not any(each.same() for each in held), "they keep no module"


def test_experts_that_hold_nothing_are_not_looked_at():
    assert held_by_experts(NumpyEnds()) == ()


def test_where_torch_takes_no_guard_such_layers_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(wrapping, "hold_while", lambda holds, text: False)
    model, run, backend = compiled(DenseSum(expert=Adapted))
    with torch.no_grad(), pytest.warns(capture.CaptureWarning, match="numbers that may change"):
        torch.testing.assert_close(run(tokens()), model(tokens()))
    assert not any(nodes_of(graph, LAYER) for graph in backend.graphs)
    model, run, backend = compiled(NumpyEnds())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", capture.CaptureWarning)
        run(tokens())
    assert len(nodes_of(backend.graphs[0], LAYER)) == 1
