"""DeepCache for a transformer: which blocks run at every step, against a loop over blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moeca_compile
from moeca_compile.options import ConfigError
from moeca_compile.reporting.collect import AT_EVERY_STEP
from tests.harness import captured
from tests.models import Sizes, TinyDiTMoE, make_inputs, make_model

pytestmark = pytest.mark.usefixtures("traced_once")
STEPS, EVERY = 12, 4


class DeepCache:
    """Blocks as a list: those of the middle run at full steps only."""

    def __init__(self, model: TinyDiTMoE, first: int, last: int) -> None:
        self.model, self.first, self.last = model, first, len(model.blocks) - last
        self.change: Tensor | None = None

    @torch.no_grad()
    def step(self, number: int, time: float, x: Tensor, y: Tensor) -> Tensor:
        h, c = self.model.embed_inputs(x, torch.full((len(x),), time), y)
        for block in self.model.blocks[: self.first]:
            h = block(h, c)
        if number % EVERY == 0:
            before = h
            for block in self.model.blocks[self.first : self.last]:
                h = block(h, c)
            self.change = h - before
        else:
            h = h + self.change
        for block in self.model.blocks[self.last :]:
            h = block(h, c)
        return self.model.finish(h, c)


@pytest.mark.parametrize(("first", "last"), [(1, 1), (2, 0), (0, 3), (0, 0)])
def test_a_generation_is_that_of_the_loop(model, graph, eager_steps, first, last):
    reference = DeepCache(model, first, last)
    engine = graph.engine(recipe="deepcache", first_blocks=first, last_blocks=last, full_every=EVERY)
    x, y = make_inputs(model)
    for number in range(STEPS):
        time = 1 - number / STEPS
        (found,) = engine(*graph.arguments(x=x, t=torch.full((len(x),), time), y=y))
        expected = reference.step(number, time, x, y)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        x = x - found / STEPS


def test_the_report_says_which_blocks_run_at_every_step():
    model = make_model()
    compiled = torch.compile(model, backend="moeca", options={"recipe": "deepcache", "lowering": "eager"})
    x, y = make_inputs(model)
    with torch.no_grad():
        for number in range(STEPS):
            compiled(x * (1 - number / 50), torch.full((len(x),), 1 - number / STEPS), y)
    report = moeca_compile.report(compiled)
    assert report.steps == {"full": 3, "cache": 9}
    every = {region.name.split(".")[1] for region in report.regions if region.reason == AT_EVERY_STEP}
    cached = {region.name.split(".")[1] for region in report.regions if region.status == "cached"}
    assert (every, cached) == ({"0", "3"}, {"1", "2"})
    assert report.flops is not None and 1.1 < report.flops.speedup < 2


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("first", "last"), [(1, 1), (2, 0), (0, 5)])
def test_a_model_with_too_few_blocks_is_warned_of(eager_steps, first, last):
    model = make_model(Sizes(depth=2))
    noise, labels = make_inputs(model)
    with pytest.warns(UserWarning, match="nothing that it could cache.*more blocks than first_blocks"):
        loop = captured(model, noise, torch.ones(2), labels).loop(
            recipe="deepcache", first_blocks=first, last_blocks=last
        )
    assert not loop.compiled.caching


def test_its_options_are_for_no_other_recipe():
    with pytest.raises(ConfigError, match="recipe 'stack' ignores it; it is for deepcache"):
        moeca_compile.MoecaConfig(recipe="stack", first_blocks=2)
    with pytest.raises(ConfigError, match="recipe 'deepcache' ignores it"):
        moeca_compile.MoecaConfig(recipe="deepcache", attention_every=2)
