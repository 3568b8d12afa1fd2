"""An unmodified public MoE layer, as installed: HiDream's feed-forward in diffusers."""

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
    assert len(nodes_of(backend.graphs[0], torch.ops.moeca.experts)) == 1
    assert capture.refusals() == ()
    torch.testing.assert_close(got, want)
