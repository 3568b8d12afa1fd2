"""Unmodified public models, as installed: HiDream's feed-forward and Nucleus in diffusers."""

from __future__ import annotations

import pytest
import torch

from moeca_compile import capture
from tests.harness import RecordingBackend, nodes_of
from tests.references import run_with_markers

hidream = pytest.importorskip("diffusers.models.transformers.transformer_hidream_image")


def test_hidreams_feed_forward_is_one_graph():
    model = hidream.MOEFeedForwardSwiGLU(16, 32, num_routed_experts=4, num_activated_experts=2).eval()
    with torch.no_grad():
        model.gate.weight.normal_()
    x = torch.randn(2, 9, 16)
    backend = RecordingBackend(run=lambda gm: lambda *inputs: run_with_markers(gm, inputs))
    with torch.no_grad():
        got, want = torch.compile(model, backend=backend)(x), model(x)
    assert len(backend.graphs) == 1
    assert len(nodes_of(backend.graphs[0], torch.ops.moeca.experts_fixed_k)) == 1
    assert capture.refusals() == ()
    torch.testing.assert_close(got, want)


nucleus = pytest.importorskip("diffusers.models.transformers.transformer_nucleusmoe_image")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("use_grouped_mm", [False, True])
@pytest.mark.parametrize("use_sigmoid", [False, True])
def test_nucleus_layer_of_expert_choice_is_one_graph(use_grouped_mm, use_sigmoid):
    """Its experts are a module of their own, looped over with counts that the host reads, or by grouped matmuls."""
    model = nucleus.NucleusMoELayer(16, 24, 4, 1.5, use_sigmoid, 2.5, use_grouped_mm).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    x, unmodulated, time = torch.randn(2, 10, 16), torch.randn(2, 10, 16), torch.randn(2, 16)
    backend = RecordingBackend(run=lambda gm: lambda *inputs: run_with_markers(gm, inputs))
    with torch.no_grad():
        got = torch.compile(model, backend=backend)(x, unmodulated, timestep=time)
        want = model(x, unmodulated, timestep=time)
    (gm,) = backend.graphs
    (marker,) = nodes_of(gm, torch.ops.moeca.experts_variable_k)
    assert marker.args[5:] == (4, 2 * 4 * 4, False)
    assert capture.refusals() == ()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("use_grouped_mm", [False, True])
def test_the_whole_nucleus_model_is_one_graph(use_grouped_mm):
    model = nucleus.NucleusMoEImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=24,
        capacity_factors=1.5,
        mlp_ratio=8.0,
        use_grouped_mm=use_grouped_mm,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    inputs = (torch.randn(2, 16, 8), (1, 4, 4), torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool))
    backend = RecordingBackend(run=lambda gm: lambda *inputs: run_with_markers(gm, inputs))
    time = torch.full((2,), 0.5)
    with torch.no_grad():
        want = model(*inputs, time, return_dict=False)[0]
        got = torch.compile(model, backend=backend)(*inputs, time, return_dict=False)[0]
    assert len(backend.graphs) == len(nodes_of(backend.graphs[0], torch.ops.moeca.experts_variable_k)) == 1
    torch.testing.assert_close(got, want)
