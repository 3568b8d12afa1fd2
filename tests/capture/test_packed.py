"""Packed experts: their parameters are slices, in the marker and for the passes after capture; near misses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moeca_compile._torch_private import export_functional
from moeca_compile.capture.idioms import dense, gathered_weights, grouped_matmul
from moeca_compile.capture.numerics import UntrustedError
from moeca_compile.capture.source import innermost, read_method
from moeca_compile.capture.trust import vouch
from moeca_compile.ops import bodies
from moeca_compile.passes.match.experts import expert_body
from tests.capture.inline_layers import DensePacked, GatheredEinsum, GroupedMatmul, Packed, PackedMask
from tests.capture.layers import EXPERTS, WIDTH, stack, tokens
from tests.harness import RecordingBackend, nodes_of
from tests.references import run_with_markers

LAYER = torch.ops.moeca.experts_fixed_k


@pytest.mark.smoke
@pytest.mark.parametrize("layer", [PackedMask, GroupedMatmul, GatheredEinsum, DensePacked])
def test_the_passes_take_slices_as_parameters(layer):
    model, x = stack(layer()), tokens()
    backend = RecordingBackend(run=lambda gm: lambda *args: (x,))
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
        exported = export_functional(backend.graphs[0], backend.inputs[0])
        want = model(x)
    torch.testing.assert_close(run_with_markers(exported, backend.inputs[0])[0], want)
    (marker,) = nodes_of(exported, LAYER)
    body = expert_body(marker)
    packed = 3 if layer is PackedMask else 2
    assert body.experts == EXPERTS and len(body.parameters) == EXPERTS * packed
    assert [node.target for node in body.parameters] == [torch.ops.aten.select.int] * len(body.parameters)
    rows = torch.randn(3, WIDTH)  # another number of rows than in the trace
    own = [torch.randn(node.meta["val"].shape) for node in body.parameters[:packed]]
    assert bodies.run(body.key, [rows], own).shape == (3, WIDTH)


def recognize(function, idiom):
    method = read_method(innermost(function))
    return idiom.recognize(method) if idiom.plausible(method.function.__code__) else None


def refused(layer: torch.nn.Module, idiom) -> str:
    """The reason why the check refuses the layer's forward."""
    layer.eval()
    forward = type(layer).forward
    found = recognize(forward, idiom)
    assert found is not None
    with pytest.raises(UntrustedError) as caught:
        vouch(found, innermost(forward), layer, found.facts((tokens()[0],), {}))
    return str(caught.value)


class NormOverTokens(Packed):
    def forward(self, x):
        weight, index = self.route(x)
        flat = index.reshape(-1)
        order = flat.argsort()
        ends = torch.bincount(flat, minlength=self.num_experts).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(x[order // self.top_k], self.gate_up_proj, offs=ends).chunk(2, dim=-1)
        h = F.silu(gate) * up
        y = torch._grouped_mm(h - h.mean(0), self.down_proj, offs=ends)
        return torch.zeros_like(x).index_add(0, order // self.top_k, y * weight.view(-1)[order, None])


def test_experts_that_mix_tokens_are_refused():
    assert "depends on the other tokens" in refused(NormOverTokens(), grouped_matmul)


class DenseGate(Packed):
    """The gate is not sparse: ids were scattered into a mask that is used for something else."""

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        index = scores.topk(self.top_k, dim=-1)[1]
        gates = scores + 0.1 * torch.zeros_like(scores).scatter(1, index, 1.0)
        gate, up = torch.einsum("td,edh->teh", x, self.gate_up_proj).chunk(2, dim=-1)
        y = torch.einsum("teh,ehd->ted", F.silu(gate) * up, self.down_proj)
        return (y * gates.unsqueeze(-1)).sum(dim=1)


def test_a_gate_that_is_not_sparse_is_refused():
    assert "not the sum of its experts' weighted outputs" in refused(DenseGate(), dense)


class Unsorted(Packed):
    """Rows in another order than the offsets say."""

    def forward(self, x):
        weight, index = self.route(x)
        flat = index.reshape(-1)
        order = flat.argsort()
        token = order.flip(0) // self.top_k
        ends = torch.bincount(flat, minlength=self.num_experts).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(x[token], self.gate_up_proj, offs=ends).chunk(2, dim=-1)
        y = torch._grouped_mm(F.silu(gate) * up, self.down_proj, offs=ends)
        return torch.zeros_like(x).index_add(0, token, y * weight.view(-1)[order, None])


def test_rows_that_are_not_sorted_are_refused():
    assert "not the sum of its experts' weighted outputs" in refused(Unsorted(), grouped_matmul)


def embedding(self, x):
    """A table looked up by labels: no experts."""
    return torch.einsum("bd,bd->b", self.table[x.argmax(-1)], x)


def routed_tables(self, x):
    """Looked up, but summed without weights."""
    index = self.router(x).topk(2)[1]
    return torch.einsum("td,tkdh->th", x, self.weight[index])


def multi_head(self, x):
    """einsum with a parameter, and a scatter: no gate."""
    h = torch.einsum("td,edh->teh", x, self.heads)
    return torch.zeros_like(h).scatter(1, x.long()[:, :, None], h)


@pytest.mark.parametrize("near_miss", [embedding, routed_tables, multi_head])
@pytest.mark.parametrize("idiom", [dense, gathered_weights, grouped_matmul])
def test_near_misses_are_not_recognized(near_miss, idiom):
    assert recognize(near_miss, idiom) is None
