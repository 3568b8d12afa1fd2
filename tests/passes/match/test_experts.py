"""MoE layers from their markers: expert bodies, router, shared experts, probe."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.ops import bodies
from moeca_compile.passes.analysis.token_axis import Layout, token_layouts
from moeca_compile.passes.match.attention import attention_nodes, match_attention
from moeca_compile.passes.match.experts import expert_body, expert_nodes, match_experts
from moeca_compile.passes.match.regions import Attention, Experts, Skipped
from tests.harness import exported, nodes_of, ops, placeholders

B, N, D, HIDDEN, E, K = 2, 5, 8, 6, 4, 2
X, GATE, SHARED = torch.randn(B, N, D), torch.randn(E, D), torch.randn(D, D)


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up).relu(), down)


def with_bias(x: Tensor, up: Tensor, b: Tensor, down: Tensor, c: Tensor) -> Tensor:
    return F.linear(F.linear(x, up, b).relu(), down, c)


def in_heads(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """With the number of rows as a literal in its views."""
    h = F.linear(x, up).view(B * N, 2, HIDDEN // 2).transpose(1, 2).reshape(B * N, HIDDEN)
    return F.linear(h.unsqueeze(0).expand(1, B * N, HIDDEN)[0], down)


BODIES = {
    mlp: [(HIDDEN, D), (D, HIDDEN)],
    with_bias: [(HIDDEN, D), (HIDDEN,), (D, HIDDEN), (D,)],
    in_heads: [(HIDDEN, D), (D, HIDDEN)],
}


def make_parameters(body=mlp) -> list[Tensor]:
    return [torch.randn(shape) for _ in range(E) for shape in BODIES[body]]


def routed(rows: Tensor, index: Tensor, weight: Tensor, parameters: tuple[Tensor, ...], body=mlp) -> Tensor:
    """What capture writes for an MoE layer."""
    own = parameters[: len(parameters) // E]
    output = body(torch.ops.moeca.expert_rows(rows), *own)
    return torch.ops.moeca.experts_fixed_k(rows, index, weight, output, list(parameters), E)


def choose(rows: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    weight, index = F.linear(rows, gate).softmax(-1).topk(K)
    return index, weight


def layer(x: Tensor, gate: Tensor, shared: Tensor, *parameters: Tensor, body=mlp) -> Tensor:
    rows = F.layer_norm(x, (D,)).reshape(-1, D)
    return x + routed(rows, *choose(rows, gate), parameters, body).view(x.shape)


def matched(function, *inputs: Tensor) -> tuple[fx.GraphModule, Experts | Skipped]:
    gm = exported(function, *(inputs or (X, GATE, SHARED, *make_parameters())))
    before = ops(gm)
    layouts = token_layouts(gm.graph, {placeholders(gm)[0]: Layout(0, 1, B, N)})
    found = [part for node in attention_nodes(gm.graph) for part in match_attention(node, layouts)]
    attentions = tuple(a for a in found if isinstance(a, Attention))
    (marker,) = expert_nodes(gm.graph)
    result = match_experts(marker, expert_body(marker), layouts, attentions)
    assert ops(gm) == before, "matching never edits"
    return gm, result


@pytest.mark.parametrize("body", BODIES)
def test_the_body_is_taken_out_as_a_function_of_any_number_of_rows(body):
    parameters = make_parameters(body)
    gm = exported(lambda *inputs: layer(*inputs, body=body), X, GATE, SHARED, *parameters)
    (marker,) = expert_nodes(gm.graph)
    found = expert_body(marker)
    each = len(parameters) // E
    assert found.experts == E
    assert found.rows == (marker.args[0],)
    assert list(found.parameters) == placeholders(gm)[3:]
    assert found.flops_per_row == 2 * 2 * D * HIDDEN
    for rows in (1, 3, B * N) if body is in_heads else (0, 1, 3, B * N):
        x = torch.randn(rows, D)
        for expert in range(E):
            own = parameters[each * expert : each * (expert + 1)]
            expected = (mlp if body is not with_bias else with_bias)(x, *own)
            if body is in_heads:
                hidden = F.linear(x, own[0]).view(rows, 2, -1).transpose(1, 2).reshape(rows, HIDDEN)
                expected = F.linear(hidden, own[1])
            torch.testing.assert_close(bodies.run(found.key, [x], own), expected)


def test_two_layers_with_equal_experts_share_a_body_and_others_do_not():
    def function(x: Tensor, gate: Tensor, shared: Tensor, *parameters: Tensor) -> Tensor:
        x = layer(layer(x, gate, shared, *parameters), gate, shared, *parameters)
        return layer(x, gate, shared, *parameters, body=lambda x, up, down: mlp(x, up, down).tanh())

    gm = exported(function, X, GATE, SHARED, *make_parameters())
    first, second, third = (expert_body(marker).key for marker in expert_nodes(gm.graph))
    assert first == second != third


def test_a_layer():
    gm, found = matched(layer)
    assert isinstance(found, Experts)
    topk = nodes_of(gm, torch.ops.aten.topk)[0]
    assert (found.choice.args[0], found.weight.args[0]) == (topk, topk)
    assert [found.marker] == expert_nodes(gm.graph)
    assert found.residual.stream is placeholders(gm)[0]
    assert found.shared == ()
    assert found.probe is None


def test_a_shared_expert():
    def with_shared(x, gate, shared, *parameters):
        z = F.layer_norm(x, (D,))
        rows = z.reshape(-1, D)
        return x + (routed(rows, *choose(rows, gate), parameters).view(x.shape) + F.linear(z, shared).relu())

    gm, found = matched(with_shared)
    assert isinstance(found, Experts)
    (shared,) = found.shared
    assert [shared.output] == nodes_of(gm, torch.ops.aten.relu)[1:]
    assert shared.stream is found.residual.stream


def test_two_shared_experts_one_of_them_gated():
    def with_two(x, gate, shared, *parameters):
        rows = x.reshape(-1, D)
        one = F.linear(x, shared).sigmoid()
        two = F.linear(x, shared.t()).tanh()
        return x + ((routed(rows, *choose(rows, gate), parameters).view(x.shape) + one) + 0.5 * two)

    _, found = matched(with_two)
    assert isinstance(found, Experts)
    assert len(found.shared) == 2


def test_what_is_cheap_beside_the_experts_is_no_shared_expert():
    def with_cheap(x, gate, shared, *parameters):
        rows = x.reshape(-1, D)
        return x + (routed(rows, *choose(rows, gate), parameters).view(x.shape) + x.relu() * 2)

    _, found = matched(with_cheap)
    assert isinstance(found, Experts)
    assert found.shared == ()


def attend(x: Tensor, weight: Tensor) -> Tensor:
    q = F.linear(x, weight).view(B, N, 2, D // 2).transpose(1, 2)
    return F.linear(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(x.shape), weight)


def test_the_probe_is_the_attention_right_before_the_router():
    def block(x, gate, shared, *parameters):
        return layer(x + attend(x, shared), gate, shared, *parameters)

    _, found = matched(block)
    assert isinstance(found, Experts)
    assert found.probe is not None
    assert found.probe.residual.add is found.residual.stream


def test_no_probe_where_something_lies_between():
    def block(x, gate, shared, *parameters):
        x = x + attend(x, shared)
        return layer(x + F.linear(x, shared).relu(), gate, shared, *parameters)

    _, found = matched(block)
    assert isinstance(found, Experts)
    assert found.probe is None


def sigmoid_with_bias(x, gate, shared, *parameters):
    """Scores with a correction bias choose, the scores themselves weigh."""
    rows = x.reshape(-1, D)
    scores = F.linear(rows, gate).sigmoid()
    index = (scores + shared[0, :E]).topk(K)[1]
    weight = scores.gather(-1, index)
    return x + routed(rows, index, weight / weight.sum(-1, keepdim=True) * 2.5, parameters).view(x.shape)


def by_sample(x, gate, shared, *parameters):
    """The router works on (B, N, D), its choice is flattened for dispatch."""
    weight, index = F.linear(x, gate).sigmoid().topk(K, sorted=False)
    rows = routed(x.reshape(-1, D), index.view(-1, K), weight.view(-1, K), parameters)
    return x + rows.view(x.shape)


@pytest.mark.parametrize("function", [sigmoid_with_bias, by_sample])
def test_routers(function):
    _, found = matched(function)
    assert isinstance(found, Experts)


def no_topk(x, gate, shared, *parameters):
    rows = x.reshape(-1, D)
    index = torch.arange(K).expand(B * N, K) + (rows[:, :K] > 0).long() * 2
    return x + routed(rows, index, rows[:, :K].sigmoid(), parameters).view(x.shape)


def expert_choice(x, gate, shared, *parameters):
    """Weights depend on the other tokens."""
    rows = x.reshape(-1, D)
    scores = F.linear(x, gate).softmax(1).reshape(-1, E)
    weight, index = scores.topk(K)
    return x + routed(rows, index, weight, parameters).view(x.shape)


def convolved(x, gate, shared, *parameters):
    """A convolution over tokens before the router and the experts."""
    z = F.conv1d(x.transpose(1, 2), shared[:, :1, None], groups=D).transpose(1, 2)
    rows = z.reshape(-1, D)
    return x + routed(rows, *choose(rows, gate), parameters).view(x.shape)


def no_residual(x, gate, shared, *parameters):
    rows = x.reshape(-1, D)
    return routed(rows, *choose(rows, gate), parameters).view(x.shape) * 2


def mixed_after(x, gate, shared, *parameters):
    rows = x.reshape(-1, D)
    return x + routed(rows, *choose(rows, gate), parameters).view(x.shape).softmax(1)


NEAR_MISSES = {
    no_topk: "no top-k",
    expert_choice: "not choose token by token",
    convolved: "not computed token by token",
    no_residual: "no residual addition",
    mixed_after: "not computed token by token",
}


@pytest.mark.parametrize("function", NEAR_MISSES)
def test_near_miss(function):
    _, found = matched(function)
    assert isinstance(found, Skipped)
    assert found.kind == "experts"
    assert NEAR_MISSES[function] in found.reason
