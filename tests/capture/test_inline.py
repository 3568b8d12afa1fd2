"""A whole `forward` with router and dispatch: one graph, one marker a layer, eager's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moeca_compile import capture
from tests.capture import inline_layers
from tests.capture.inline_layers import (
    DENSE,
    MASK_LOOPS,
    PACKED,
    SORTED,
    ExtrasInline,
    SortedWithExtras,
    WithTimestep,
)
from tests.capture.layers import EXPERTS, WIDTH, stack, tokens
from tests.harness import RecordingBackend, nodes_of
from tests.references import run_with_markers

ROWS, LAYER = torch.ops.moeca.expert_rows, torch.ops.moeca.experts_fixed_k


def assert_captured(model: nn.Module, *inputs: torch.Tensor, layers: int = 1, **tolerance: float) -> None:
    """One graph with so many markers, whose meaning is what eager returns."""
    backend = RecordingBackend(run=lambda gm: lambda *args: run_with_markers(gm, args))
    with torch.no_grad():
        want = model(*inputs)
        got = torch.compile(model, backend=backend)(*inputs)
    assert capture.refusals() == ()
    assert len(backend.graphs) == 1
    assert len(nodes_of(backend.graphs[0], LAYER)) == layers
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.sampled(3)
@pytest.mark.smoke
@pytest.mark.parametrize("layer", [*MASK_LOOPS, *SORTED, *PACKED, *DENSE])
def test_one_graph_with_the_numbers_of_eager(layer):
    assert_captured(stack(layer(), layer()), tokens(), layers=2)


@pytest.mark.parametrize("layer", [MASK_LOOPS[0], MASK_LOOPS[2]])
def test_half_precision_with_the_originals_dtype(layer):
    assert_captured(stack(layer()).bfloat16(), tokens(torch.bfloat16), rtol=0.05, atol=0.05)


def test_a_float32_router_of_half_precision_rows():
    assert_captured(stack(inline_layers.WeightedAfter()).half(), tokens(torch.float16), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("layer", [inline_layers.SlotBySlot, inline_layers.OneHotHit])
def test_one_branch_a_token(layer):
    assert_captured(stack(layer(top_k=1)), tokens())


def test_ids_that_are_no_experts_stay_in_range():
    """The later passes look parameters and thresholds up by the ids."""
    backend = RecordingBackend(run=lambda gm: lambda *args: (run_up_to_ids(gm, args), tokens())[1:])
    seen = []

    def run_up_to_ids(gm, args):
        (layer,) = nodes_of(gm, LAYER)
        graph = torch.fx.Graph()
        copies = {}
        for node in gm.graph.nodes:
            if node is layer:
                break
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output((copies[layer.args[1]], copies[layer.args[2]]))
        seen.append(torch.fx.GraphModule(gm, graph)(*args))

    with torch.no_grad():
        torch.compile(stack(inline_layers.Dropping()), backend=backend)(tokens())
    ((index, weight),) = seen
    assert index.min() >= 0 and index.max() < EXPERTS
    assert (weight == 0).any() and (weight > 0).any()


def test_two_dimensional_inputs():
    assert_captured(stack(inline_layers.TopOne()), tokens()[0])


@pytest.mark.parametrize("layer", [WithTimestep, SortedWithExtras, ExtrasInline])
def test_further_rows_of_an_expert(layer):
    assert_captured(layer().eval(), tokens(), torch.randn(2, WIDTH))


class Lenient(inline_layers.AllExperts):
    """Its dispatch is handed the ids, some of them no expert's."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        weight, index = self.router(rows).softmax(-1).topk(self.top_k, dim=-1)
        return self.run_experts(rows, torch.where(weight > weight.mean(), index, -1), weight).view_as(x)

    def run_experts(self, rows, index, weight):
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            out.index_add_(0, token, expert(rows[token]) * weight[token, slot, None])
        return out


class LenientSegments(Lenient):
    def run_experts(self, rows, index, weight):
        out, order = torch.zeros_like(rows), index.view(-1).argsort()
        ends = (index.view(-1) + 1).bincount(minlength=EXPERTS + 1).cumsum(0).tolist()
        for e in range(EXPERTS):
            branch = order[ends[e] : ends[e + 1]]
            token = branch // self.top_k
            out.index_add_(0, token, self.experts[e](rows[token]) * weight.view(-1, 1)[branch])
        return out


@pytest.mark.parametrize("layer", [Lenient, LenientSegments])
def test_ids_that_are_handed_and_no_experts_have_no_weight(layer):
    assert_captured(stack(layer()), tokens())
