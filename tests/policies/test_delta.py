"""Delta-DiT: the last blocks cached before the boundary, the first ones after it, against a loop over blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moeca_compile
from moeca_compile.options import ConfigError
from moeca_compile.passes.rewrite.kinds import REUSING, StepKind
from tests.harness import captured
from tests.models import Sizes, TinyDiTMoE, make_inputs, make_model

pytestmark = pytest.mark.usefixtures("traced_once")
STEPS, EVERY = 12, 4


class DeltaDiT:
    """Blocks as a list, and the changes that the first c and the last c of them made at the last full step."""

    def __init__(self, model: TinyDiTMoE, cached: int, boundary: float) -> None:
        self.model, self.cached, self.boundary = model, cached, boundary
        self.front: Tensor | None = None
        self.rear: Tensor | None = None

    @torch.no_grad()
    def step(self, number: int, time: float, x: Tensor, y: Tensor) -> Tensor:
        h, c = self.model.embed_inputs(x, torch.full((len(x),), time), y)
        blocks, depth = self.model.blocks, len(self.model.blocks)
        if number % EVERY == 0:
            streams = [h]
            for block in blocks:
                streams.append(block(streams[-1], c))
            self.front = streams[self.cached] - streams[0]
            self.rear = streams[depth] - streams[depth - self.cached]
            return self.model.finish(streams[-1], c)
        if number < self.boundary:
            for block in blocks[: depth - self.cached]:
                h = block(h, c)
            return self.model.finish(h + self.rear, c)
        h = h + self.front
        for block in blocks[self.cached :]:
            h = block(h, c)
        return self.model.finish(h, c)


def same_generation(model, graph, engine, reference: DeltaDiT) -> None:
    x, y = make_inputs(model)
    for number in range(STEPS):
        time = 1 - number / STEPS
        (found,) = engine(*graph.arguments(x=x, t=torch.full((len(x),), time), y=y))
        expected = reference.step(number, time, x, y)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), number
        x = x - found / STEPS


@pytest.mark.parametrize(
    ("share", "cached", "boundary"), [(0.75, 3, 0.5), (0.5, 2, 0.2), (0.01, 1, 0.6), (0.99, 3, 0.0), (0.5, 2, 1.0)]
)
def test_a_generation_is_that_of_the_loop(model, graph, eager_steps, share, cached, boundary):
    """The boundary lies between two cache steps after one full step, or at an end."""
    options = {"cached_blocks": share, "boundary": boundary, "full_every": EVERY}
    with moeca_compile.generation(steps=STEPS):
        engine = graph.engine(recipe="delta", **options)
        same_generation(model, graph, engine, DeltaDiT(model, cached, boundary * STEPS))


def test_planned_flops_are_those_of_the_blocks_that_run(graph):
    plan = graph.loop(recipe="delta", validate=False).compiled.plan
    rear, front = (plan.flops(StepKind(False, False, group=group)) for group in ("rear", "front"))
    assert plan.flops(REUSING) == pytest.approx((rear + front) / 2)
    block = graph.loop(recipe="deepcache", first_blocks=0, last_blocks=1, validate=False).compiled.plan
    assert front == block.flops(REUSING) and rear < plan.flops(StepKind()) / 2


def test_without_the_number_of_steps_all_are_early_and_then_it_is_that_of_the_last_generation(
    model, graph, eager_steps
):
    engine = graph.engine(recipe="delta", full_every=EVERY)
    for boundary in (STEPS, STEPS / 2):
        same_generation(model, graph, engine, DeltaDiT(model, 3, boundary))


def test_the_report_has_both_kinds_of_cache_steps():
    model = make_model()
    compiled = torch.compile(model, backend="moeca", options={"recipe": "delta", "lowering": "eager"})
    x, y = make_inputs(model)
    with torch.no_grad(), moeca_compile.generation(steps=STEPS):
        for number in range(STEPS):
            compiled(x * (1 - number / 50), torch.full((len(x),), 1 - number / STEPS), y)
    report = moeca_compile.report(compiled)
    assert report.steps == {"full": 3, "cache rear": 4, "cache front": 5}
    assert {region.status for region in report.regions} == {"cached"}
    assert report.flops is not None and 1.5 < report.flops.speedup < 3
    assert report.planned_cache_bytes == 2 * x.shape[0] * model.sizes.tokens * model.sizes.width * 4


def test_a_model_of_one_block_is_warned_of(eager_steps):
    model = make_model(Sizes(depth=1))
    noise, labels = make_inputs(model)
    with pytest.warns(UserWarning, match="nothing that it could cache.*more than one block"):
        loop = captured(model, noise, torch.ones(2), labels).loop(recipe="delta")
    assert not loop.compiled.caching


def test_its_options_are_for_no_other_recipe():
    with pytest.raises(ConfigError, match="recipe 'stack' ignores it; it is for delta"):
        moeca_compile.MoecaConfig(recipe="stack", boundary=0.4)
    for name, value in (("corrector", True), ("attention_every", 2), ("first_blocks", 2)):
        with pytest.raises(ConfigError, match="recipe 'delta' ignores it"):
            moeca_compile.MoecaConfig(recipe="delta", **{name: value})
