"""The default recipe is what its parts are: told to be deterministic or stochastic, or seen to be deterministic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moeca_compile
from tests.models import Sizes, make_inputs, make_model

pytestmark = pytest.mark.usefixtures("traced_once")
STEPS = 12
STACK = {"recipe": "stack-forecast", "schedule": "tapered"}
LAYERS = {"recipe": "fora-forecast", "schedule": "tapered"}


class Widened(nn.Module):
    """Its tokens get wider after two blocks, so that no stream runs through all of them."""

    def __init__(self):
        super().__init__()
        self.narrow, self.model = make_model(Sizes(depth=2)), make_model(Sizes(width=48, depth=2))
        self.widen = nn.Linear(self.narrow.sizes.width, 48)

    def forward(self, x, t, y):
        h, c = self.narrow.embed_inputs(x, t, y)
        for block in self.narrow.blocks:
            h = block(h, c)
        h, c = self.widen(h), self.model.embed_inputs(x, t, y)[1]
        for block in self.model.blocks:
            h = block(h, c)
        return self.model.finish(h, c)


def pictures(model, options, told=None):
    """Two generations of Euler steps: the first one shows how many steps there are."""
    torch._dynamo.reset()
    fast = torch.compile(model, backend="moeca", options={"lowering": "eager", "validate": False, **options})
    noise, labels = make_inputs(getattr(model, "model", model))
    found = []
    for _ in range(2):
        x = noise
        with torch.no_grad(), moeca_compile.generation(steps=STEPS, deterministic=told):
            for step in range(STEPS):
                x = x - fast(x, torch.full((len(x),), 1 - step / STEPS), labels) / STEPS
        found.append(x)
    return torch.stack(found), moeca_compile.report(fast)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("how", ["option", "mark"])
@pytest.mark.parametrize(
    ("told", "same"),
    [(True, {"corrector": True}), (False, {"forecast_slope": 0.5}), (None, {"corrector": True})],
    ids=["deterministic", "stochastic", "not told, but seen"],
)
def test_it_is_a_forecast_over_the_stack_as_the_sampler_allows(how, told, same):
    model = make_model()
    sampler = {True: "deterministic", False: "stochastic", None: None}[told]
    if how == "option":
        found, report = pictures(model, {"sampler": sampler})
    else:
        found, report = pictures(model, {}, told)
    wanted, other = pictures(model, {**STACK, **same})
    assert torch.equal(found, wanted)
    assert report.steps == other.steps == {"full": 6, "cache": 18}
    assert report.corrections == other.corrections == (0 if told is False else 4)
    assert report.planned_cache_bytes == other.planned_cache_bytes and report.config["recipe"] == "auto"


def test_the_option_goes_before_the_mark_and_other_recipes_are_told_nothing():
    model = make_model()
    assert pictures(model, {"sampler": "stochastic"}, told=True)[1].corrections == 0
    assert pictures(model, STACK, told=True)[1].corrections == 0


def test_without_a_stream_through_all_blocks_layers_are_forecast():
    torch.manual_seed(0)
    model = Widened().eval().requires_grad_(False)
    found, report = pictures(model, {})
    wanted, other = pictures(model, {**LAYERS, "corrector": True})
    assert torch.equal(found, wanted) and report.steps == other.steps and "cache" in report.steps
    assert report.planned_cache_bytes == other.planned_cache_bytes > 0
    in_part = pictures(model, STACK)[1]
    assert {r.status for r in report.regions} == {"cached"} != {r.status for r in in_part.regions}
