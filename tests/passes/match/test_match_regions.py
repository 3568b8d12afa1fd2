"""All regions of one graph together."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeca_compile.passes.analysis.graph import clean_path
from moeca_compile.passes.match.match_regions import match_regions
from moeca_compile.passes.match.regions import Regions
from tests.harness import Captured, captured, exported, nodes_of, ops, placeholders
from tests.models import Sizes, make_inputs, make_model


def regions_of(graph: Captured) -> Regions:
    return graph.loop(validate=False).compiled.regions


@pytest.fixture(scope="module")
def regions(graph: Captured) -> Regions:
    return regions_of(graph)


def test_counts(regions):
    """4 blocks: 4 attentions, 2 dense feed-forwards, 2 MoE layers with a shared expert each."""
    assert len(regions.attentions) == 4
    assert len(regions.experts) == 2
    assert len(regions.feedforwards) == 2
    assert len(regions.residuals) == 8
    assert len(regions.bodies) == 2
    assert [len(layer.shared) for layer in regions.experts] == [1, 1]
    assert regions.skipped == ()
    (timestep,) = regions.timesteps
    assert timestep.name == "l_t_" or timestep.meta["val"].shape == (2,)


def test_names_are_module_paths(regions):
    assert [a.name for a in regions.attentions] == [f"blocks.{i}.attn" for i in range(4)]
    assert [e.name for e in regions.experts] == ["blocks.1.mlp", "blocks.3.mlp"]
    assert [f.name for f in regions.feedforwards] == ["blocks.0.mlp.fc2", "blocks.2.mlp.fc2"]
    (shared,) = regions.experts[0].shared
    assert shared.name == "blocks.1.mlp.shared_expert.down_proj"


def test_residuals_form_a_chain(regions):
    for before, after in zip(regions.residuals, regions.residuals[1:], strict=False):
        assert after.stream is before.add


def test_every_router_has_its_block_s_attention_for_a_probe(regions):
    assert [layer.probe for layer in regions.experts] == [regions.attentions[1], regions.attentions[3]]


def test_outputs_are_before_the_gate(regions):
    for residual in regions.residuals:
        assert residual.output.target is not torch.ops.aten.mul.Tensor
        assert residual.add.target is torch.ops.aten.add.Tensor


def test_layouts_are_of_samples_and_tokens(regions):
    assert {(layout.samples, layout.tokens) for layout in regions.layouts.values()} == {(2, 16)}
    for residual in regions.residuals:
        assert {residual.stream, residual.output, residual.add} <= set(regions.layouts)


@pytest.mark.parametrize(
    ("sizes", "batch"),
    [(Sizes(depth=1), 2), (Sizes(depth=2), 1), (Sizes(depth=2, side=4, width=64, heads=2), 3)],
)
def test_counts_at_other_sizes(sizes, batch):
    """Also where batch, tokens and heads coincide with other sizes."""
    model = make_model(sizes)
    noise, labels = make_inputs(model, batch)
    regions = regions_of(captured(model, noise, torch.ones(batch), labels))
    assert len(regions.attentions) == sizes.depth
    assert len(regions.experts) == sizes.depth // 2
    assert len(regions.feedforwards) == sizes.depth - sizes.depth // 2
    assert regions.skipped == ()


def test_nothing_is_found_where_nothing_is():
    gm = exported(lambda x, w: F.linear(x, w).relu(), torch.randn(2, 5, 4), torch.randn(4, 4))
    before = ops(gm)
    regions = match_regions(gm.graph, set(placeholders(gm)))
    assert regions == Regions()
    assert ops(gm) == before


# Streams and skips, with D wide values and one attention a block.

B, N, D = 2, 6, 8
X, W = torch.randn(B, N, D), torch.randn(D, D)


def attend(x: Tensor, w: Tensor) -> Tensor:
    q = F.linear(x, w).view(B, N, 2, D // 2).transpose(1, 2)
    return F.linear(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(B, N, D), w)


def block(x: Tensor, w: Tensor) -> Tensor:
    x = x + attend(x, w)
    return x + F.linear(F.linear(x, w).relu(), w)


def matched(function) -> tuple[Regions, list]:
    gm = exported(function, X, W)
    return match_regions(gm.graph, set(placeholders(gm))), nodes_of(gm, torch.ops.aten.add)


def test_a_dense_transformer():
    regions, adds = matched(lambda x, w: block(block(x, w), w))
    assert [r.add for r in regions.residuals] == adds
    assert len(regions.feedforwards) == 2


def test_a_long_skip_over_blocks_is_no_region():
    """Its branch holds whole blocks; they are found, and the skip's own addition stays."""
    regions, adds = matched(lambda x, w: block(block(x + attend(x, w), w) + x, w))
    skip = adds[3]
    assert skip not in [r.add for r in regions.residuals]
    assert [r.add for r in regions.residuals] == [add for add in adds if add is not skip]


def test_position_embeddings_are_no_region():
    regions, adds = matched(lambda x, w: block(x + torch.arange(N)[:, None] * 0.1, w) * 2)
    assert [r.add for r in regions.residuals] == adds[1:]


def test_the_additions_inside_a_branch_are_no_regions():
    """Bias and modulation within a feed-forward or an attention."""

    def modulated(x: Tensor, w: Tensor) -> Tensor:
        x = x + attend(x * (1 + w[0]) + w[1], w)
        hidden = F.linear(x * (1 + w[0]) + w[1], w).relu()
        return x + F.linear(hidden + F.linear(hidden, w), w)

    regions, adds = matched(modulated)
    assert [r.add for r in regions.residuals] == [add for add in adds if add in (adds[2], adds[-1])]


def test_what_a_stream_of_another_rank_surrounds_is_kept_with_a_reason():
    def picture(x: Tensor, w: Tensor) -> Tensor:
        image = x.view(B, 2, 3, D)
        q = F.linear(image, w).view(B, N, 2, D // 2).transpose(1, 2)
        return image + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(B, 2, 3, D)

    regions, _ = matched(picture)
    assert regions.attentions == ()
    (kept,) = regions.skipped
    assert "(batch, tokens, width)" in kept.reason


def test_attention_and_feedforward_beside_each_other_are_one_branch():
    regions, adds = matched(lambda x, w: x + (attend(x, w) + F.linear(F.linear(x, w).relu(), w)))
    assert len(regions.attentions) == 1
    assert [r.add for r in regions.residuals] == [adds[-1]]
    assert [r.output for r in regions.residuals] == [adds[0]]
    assert regions.feedforwards == ()


def test_paths():
    assert clean_path("L['self']._modules['blocks']._modules['1'].attn") == "blocks.1.attn"
    assert clean_path("L['self'].__dict__['_modules']['blocks'].0.attn") == "blocks.0.attn"
    assert clean_path("L['model']._modules['blocks']._modules['1']") == "model.blocks.1"
    assert clean_path("") == ""


def test_kinds_of_what_is_kept():
    def dropping(x: Tensor, w: Tensor) -> Tensor:
        q = F.linear(x, w).view(B, N, 2, D // 2).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).transpose(1, 2).reshape(B, N, D)
        x = x + ((q @ q.mT).tanh().softmax(-1) @ q).transpose(1, 2).reshape(B, N, D)
        return block(x, w)

    regions, _ = matched(dropping)
    assert Counter(k.kind for k in regions.skipped) == {"attention": 2}
    assert len(regions.attentions) == 1
