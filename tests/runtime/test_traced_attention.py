"""Steps of models with other attentions, traced to graphs: these must be what their eager functions are."""

from __future__ import annotations

import pytest
import torch

from tests.harness import captured
from tests.models import make_inputs
from tests.runtime.test_attention_variants import CROSS, MASKED, MIXED, SPELLED, Sampler, WithCondition

pytestmark = pytest.mark.usefixtures("without_inductor")

MODELS = {
    "causal": lambda: Sampler(MASKED["causal"]),
    "merged heads and a bias": lambda: Sampler(MASKED["merged heads and a bias"]),
    "spelled out": lambda: Sampler(SPELLED["upcast, with a bias"]),
    "to a text": lambda: Sampler(None, CROSS["masked"]),
    "a convolution before the router": lambda: WithCondition(None, MIXED["a convolution over the grid"]),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["moeca", "fora-forecast"])
def test_every_step_is_traced_and_right(name, recipe, recwarn):
    model = MODELS[name]().eval().requires_grad_(False)
    noise, labels = make_inputs(model)
    graph = captured(model, noise, torch.ones(2), labels)
    engine = graph.engine(recipe=recipe, full_every=2)
    x = noise
    for number in range(4):
        t = torch.full((2,), 1 - number / 8)
        out, *_ = engine(*graph.arguments(x=x, t=t, y=labels))
        expected = model(x, t, labels)
        assert out.isfinite().all()
        if number % 2 == 0:
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        x = x - out / 8
    assert {"full", "cache"} <= {kind.name.split("[")[0] for kind in engine.loop_for(graph.inputs).steps}
    assert all(error < 1e-5 for error in engine.notes.errors.values())
    assert not [w for w in recwarn if "moeca" in str(w.message)]
