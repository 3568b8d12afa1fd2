"""Which blocks a graph has, and what a step saves that takes all but the first from the cache."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from moeca_compile.passes.match.regions import Regions
from moeca_compile.policies.block import blocks_of
from moeca_compile.reporting.collect import AT_EVERY_STEP, regions_of
from tests.harness import Captured, captured
from tests.models import Sizes, TinyDiTMoE, make_inputs, make_model

pytestmark = pytest.mark.usefixtures("eager_steps")


@pytest.fixture
def regions(graph: Captured) -> Regions:
    return graph.loop(validate=False).compiled.regions


def test_a_block_is_its_attention_and_its_feed_forward(regions):
    """Four blocks of two residual branches each, one after the other."""
    blocks = blocks_of(regions)
    assert len(blocks) == 4
    for (before, after), attention in zip(blocks, regions.attentions, strict=True):
        assert before is attention.residual.stream
        assert next(r for r in regions.residuals if r.add is after).stream is attention.residual.add
    assert all(after is before for (_, after), (before, _) in pairwise(blocks))


def test_attentions_and_feed_forwards_without_each_other_are_blocks_too(regions):
    assert len(blocks_of(regions.only(regions.attentions))) == 4
    assert len(blocks_of(regions.only([*regions.experts, *regions.feedforwards]))) == 4


def test_the_first_block_runs_at_every_step_and_the_report_says_so(graph):
    found = regions_of(graph.loop(recipe="block").compiled)
    every_step = {region.name for region in found if region.reason == AT_EVERY_STEP}
    assert every_step == {"blocks.0.attn", "blocks.0.mlp.fc2"}
    assert all(region.status == ("skipped" if region.name in every_step else "cached") for region in found)


def test_a_model_of_one_block_has_nothing_to_cache():
    model = make_model(Sizes(depth=1))
    noise, labels = make_inputs(model)
    with pytest.warns(UserWarning, match="found nothing that it could cache.*more than one block"):
        loop = captured(model, noise, torch.ones(2), labels).loop(recipe="block")
    assert not loop.compiled.caching


def test_parallel_blocks_are_one_branch_each():
    """Attention and feed-forward on the same input, added up before the residual."""

    class Parallel(TinyDiTMoE):
        def forward(self, x, t, y):
            h, c = self.embed_inputs(x, t, y)
            for block in self.blocks:
                z = block.norm1(h)
                h = h + (block.attn(z) + block.mlp(z))
            return self.finish(h, c)

    torch.manual_seed(0)
    model = Parallel(Sizes(depth=4)).eval().requires_grad_(False)
    for block in model.blocks:
        block.mlp = model.blocks[0].mlp
    noise, labels = make_inputs(model)
    loop = captured(model, noise, torch.ones(2), labels).loop(recipe="block")
    assert len(blocks_of(loop.compiled.regions)) == 4
    assert len(loop.compiled.plan.replacements) == 3
