"""An unmodified model becomes one graph with two markers a MoE layer, under this package's backend alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moeca_compile import capture
from moeca_compile._torch_private import export_functional
from tests.capture.layers import (
    EXPERT_KINDS,
    EXPERTS,
    SPELLINGS,
    WIDTH,
    NumpyEnds,
    RunningStart,
    stack,
    swiglu,
    swiglu_with_bias,
    tokens,
)
from tests.harness import RecordingBackend, nodes_of
from tests.references import run_with_markers

ROWS, LAYER = torch.ops.moeca.expert_rows, torch.ops.moeca.experts_fixed_k


def recorded(model: nn.Module, x: torch.Tensor, **options: object) -> tuple[torch.Tensor, RecordingBackend]:
    """The compiled model's output, its markers run by their meaning, and the backend that saw the graphs."""
    backend = RecordingBackend(run=lambda gm: lambda *inputs: run_with_markers(gm, inputs))
    with torch.no_grad():
        return torch.compile(model, backend=backend, **options)(x), backend


def plain_loop(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a layer of layers.py means, one token and one branch at a time."""
    rows = x.reshape(-1, WIDTH)
    weight, index = layer.router(rows).softmax(-1).topk(layer.top_k, dim=-1)
    branches = [
        sum(weight[t, j] * layer.experts[index[t, j]](rows[t : t + 1])[0] for j in range(layer.top_k))
        for t in range(len(rows))
    ]
    return x + torch.stack(branches).reshape(x.shape)


@pytest.mark.sampled(3)
@pytest.mark.smoke
@pytest.mark.parametrize(
    ("spelling", "expert", "top_k"),
    [(spelling, swiglu_with_bias, 2) for spelling in SPELLINGS]
    + [(spelling, swiglu, 1) for spelling in SPELLINGS]
    + [(NumpyEnds, expert, 3) for expert in EXPERT_KINDS],
)
def test_one_graph_with_the_numbers_of_eager(spelling, expert, top_k):
    model = stack(spelling(top_k, expert), spelling(top_k, expert))
    x = tokens()
    with torch.no_grad():
        want = model(x)
    got, backend = recorded(model, x)
    assert len(backend.graphs) == 1
    assert len(nodes_of(backend.graphs[0], ROWS)) == len(nodes_of(backend.graphs[0], LAYER)) == 2
    assert capture.refusals() == ()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_eager_is_the_meaning(spelling):
    layer, x = spelling().eval(), tokens()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain_loop(layer, x))


def test_params_are_expert_major_in_the_order_of_named_parameters():
    model = stack(NumpyEnds(2, swiglu_with_bias))
    _, backend = recorded(model, tokens())
    (gm,), (inputs,) = backend.graphs, backend.inputs
    value = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    (layer,) = nodes_of(gm, LAYER)
    params, num_experts = layer.args[4:]
    wanted = [tensor for expert in model[0].moe.experts for _, tensor in expert.named_parameters()]
    assert num_experts == EXPERTS
    assert [value[node] is tensor for node, tensor in zip(params, wanted, strict=True)] == [True] * len(wanted)


def test_the_body_uses_the_nodes_of_the_first_experts_params():
    _, backend = recorded(stack(NumpyEnds(2, swiglu_with_bias)), tokens())
    (layer,) = nodes_of(backend.graphs[0], LAYER)
    (rows,) = nodes_of(backend.graphs[0], ROWS)
    own, others = layer.args[4][:6], layer.args[4][6:]
    assert all(set(param.users) != {layer} for param in own)
    assert all(set(param.users) == {layer} for param in others)
    assert layer.args[0] is rows.args[0]


def test_buffers_come_after_parameters():
    def normed() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))  # row-wise in eval mode

    model = stack(NumpyEnds(2, normed))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2.0)
        want = model(tokens())
    got, backend = recorded(model, tokens())
    (layer,) = nodes_of(backend.graphs[0], LAYER)
    assert len(layer.args[4]) == EXPERTS * (4 + 3)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_functional_export_keeps_both_markers(spelling):
    model, x = stack(spelling(), spelling()), tokens()
    _, backend = recorded(model, x)
    with torch.no_grad():
        exported = export_functional(backend.graphs[0], backend.inputs[0])
        want = model(x)
    assert len(nodes_of(exported, ROWS)) == len(nodes_of(exported, LAYER)) == 2
    torch.testing.assert_close(run_with_markers(exported, backend.inputs[0])[0], want)


@pytest.mark.sampled(3)
@pytest.mark.smoke
@pytest.mark.parametrize("spelling", [NumpyEnds, RunningStart])
def test_another_backend_traces_the_original(spelling):
    model, x = stack(spelling()), tokens()
    recorded(model, x)
    other = RecordingBackend(ours=False)
    with torch.no_grad():
        got = torch.compile(model, backend=other)(x)
        torch.testing.assert_close(got, model(x))
    assert len(other.graphs) > 1
    assert not any(nodes_of(gm, LAYER) for gm in other.graphs)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_a_varying_batch_compiles_to_one_dynamic_graph():
    model, x = stack(NumpyEnds()), tokens()
    got, backend = recorded(model, x, dynamic=True)
    assert len(backend.graphs) == 1
    with torch.no_grad():
        torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_result_has_the_originals_dtype(dtype):
    model, x = stack(RunningStart()).to(dtype), tokens(dtype)
    got, backend = recorded(model, x)
    assert len(backend.graphs) == 1
    assert got.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(got, model(x), rtol=0.05, atol=0.05)


def test_weights_wider_than_the_rows_give_the_originals_dtype():
    class WideWeights(NumpyEnds):
        def forward(self, x):
            weight, index = self.router(x).float().softmax(-1).topk(self.top_k, dim=-1)
            return self.moe_infer(x, index.view(-1), weight.view(-1, 1))

    model, x = WideWeights().bfloat16().eval(), tokens(torch.bfloat16)[0]
    got, backend = recorded(model, x)
    assert len(backend.graphs) == 1
    with torch.no_grad():
        want = model(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_autocast_is_traced_as_one_graph():
    class UnderAutocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stack(NumpyEnds())

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    model = UnderAutocast().eval()
    got, backend = recorded(model, tokens())
    with torch.no_grad():
        want = model(tokens())
    assert len(backend.graphs) == 1
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_a_method_hidden_from_dynamo_is_captured_too():
    class Hidden(MoEWithDisabledDispatch):
        pass

    model = stack(Hidden())
    got, backend = recorded(model, tokens())
    assert len(backend.graphs) == 1
    with torch.no_grad():
        torch.testing.assert_close(got, model(tokens()))


class MoEWithDisabledDispatch(NumpyEnds):
    @torch.compiler.disable
    def moe_infer(self, x, ids, weights):
        out = torch.zeros_like(x)
        order = ids.argsort()
        ends = ids.bincount().cumsum(0).tolist()
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            if start != end:
                rows = order[start:end] // self.top_k
                out.index_add_(0, rows, self.experts[e](x[rows]) * weights[order[start:end]])
        return out


def test_blocks_that_are_compiled_themselves_are_inlined():
    class CompiledBlocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([stack(NumpyEnds()), stack(NumpyEnds())])

        @torch.compile
        def run_block(self, block, x):
            return block(x)

        def forward(self, x):
            for block in self.blocks:
                x = self.run_block(block, x)
            return x

    model = CompiledBlocks().eval()
    got, backend = recorded(model, tokens())
    assert len(backend.graphs) == 1
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(got, model(tokens()))
