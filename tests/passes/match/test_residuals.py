"""Residual branches: which additions end one, and where its gate is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.passes.analysis.token_axis import Layout, Layouts, token_layouts
from moeca_compile.passes.match.regions import Residual
from moeca_compile.passes.match.residuals import branch_input, residual_around, residual_at, residuals_around
from tests.harness import exported, nodes_of, outputs, placeholders

B, N, D = 2, 5, 4
X, GATE, OTHER = torch.randn(B, N, D), torch.randn(B, D), torch.randn(B, N, D)
W = torch.randn(D, D)
aten = torch.ops.aten


def branch(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, (D,)), w)


BRANCHES = {
    "no gate": lambda x, g, w, o: x + branch(x, w),
    "the branch first": lambda x, g, w, o: branch(x, w) + x,
    "a gate": lambda x, g, w, o: x + g.unsqueeze(1) * branch(x, w),
    "a gate behind": lambda x, g, w, o: x + branch(x, w) * g.unsqueeze(1),
    "a gate and the branch first": lambda x, g, w, o: g.unsqueeze(1) * branch(x, w) + x,
    "a tanh gate": lambda x, g, w, o: x + g.tanh().unsqueeze(1) * branch(x, w),
    "a clamped tanh gate": lambda x, g, w, o: x + (1 - g.clamp(max=0.5)).tanh()[:, None] * branch(x, w),
    "two gates": lambda x, g, w, o: x + g.unsqueeze(1) * (g.exp().unsqueeze(1) * branch(x, w)),
    "a scaled addition, whose scale stays": lambda x, g, w, o: torch.add(x, branch(x, w), alpha=2),
    "a copy of the stream in another precision": lambda x, g, w, o: x.double() + g.unsqueeze(1) * branch(x, w),
    "a gate a token": lambda x, g, w, o: x + o * branch(x, w),
}
"""All with the same branch, so that its output is the linear."""


def traced(function) -> tuple[fx.GraphModule, Layouts, fx.Node]:
    """(graph, layouts of what carries the tokens of x, the node that is returned)."""
    gm = exported(function, X, GATE, W, OTHER)
    layouts = token_layouts(gm.graph, {placeholders(gm)[0]: Layout(0, 1, B, N)})
    return gm, layouts, outputs(gm)[0]


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_is_found_from_its_addition(name):
    gm, layouts, add = traced(BRANCHES[name])
    residual = residual_at(add, layouts)
    assert residual is not None
    assert residual.stream is placeholders(gm)[0]
    assert [residual.output] == nodes_of(gm, aten.linear)
    assert residual.add is add


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_is_found_from_its_anchor(name):
    gm, _, add = traced(BRANCHES[name])
    (linear,) = nodes_of(gm, aten.linear)
    residual = residual_around(linear)
    assert residual is not None
    assert (residual.stream, residual.output, residual.add) == (placeholders(gm)[0], linear, add)


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3).squeeze(1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, g, w, o: x + g.unsqueeze(1) * (F.linear(attend(x), w) + F.linear(attend(x * 2), w)),
        lambda x, g, w, o: (F.linear(attend(x * 2), w) + F.linear(attend(x), w)) + x,
    ],
    ids=["a common gate", "no gate"],
)
def test_each_anchor_of_a_branch_has_its_own_output(function):
    gm, _, add = traced(function)
    found = [residual_around(anchor) for anchor in nodes_of(gm, aten.scaled_dot_product_attention)]
    assert [residual.output for residual in found if residual] == nodes_of(gm, aten.linear)
    assert [(residual.stream, residual.add) for residual in found if residual] == [(placeholders(gm)[0], add)] * 2


def test_a_feedforward_beside_an_anchor_belongs_to_its_output():
    gm, _, _ = traced(lambda x, g, w, o: x + g.unsqueeze(1) * (F.linear(attend(x), w) + branch(x, w)))
    residual = residual_around(nodes_of(gm, aten.scaled_dot_product_attention)[0])
    assert residual is not None
    assert residual.output is nodes_of(gm, aten.add)[0]


def test_the_first_addition_back_onto_the_stream_ends_the_branch():
    gm, _, _ = traced(lambda x, g, w, o: (x + branch(x, w)) * 2 + x)
    residual = residual_around(nodes_of(gm, aten.linear)[0])
    assert residual is not None
    assert residual.add is nodes_of(gm, aten.add)[0]


def test_work_after_the_anchor_belongs_to_the_branch():
    """A projection and an addition that is none of the stream's."""
    gm, layouts, add = traced(lambda x, g, w, o: x + F.linear(branch(x, w).relu() + o, w))
    first, last = nodes_of(gm, aten.linear)
    residual = residual_around(first)
    assert residual is not None
    assert (residual.output, residual.add) == (last, add)
    assert residual_at(add, layouts) == residual


NEAR_MISSES = {
    "a position embedding": lambda x, g, w, o: x + o,
    "a position embedding through a product": lambda x, g, w, o: x + F.linear(o, w),
    "a bias": lambda x, g, w, o: x + g.unsqueeze(1),
    "an addition of a number": lambda x, g, w, o: branch(x, w) + 1,
    "a doubled stream": lambda x, g, w, o: x + x,
    "a sum of two branches, no stream": lambda x, g, w, o: branch(x, w) + F.linear(x, w),
    "a difference": lambda x, g, w, o: x - branch(x, w),
    "another shape": lambda x, g, w, o: x + branch(x, w).mean(-1, keepdim=True),
    "a branch that mixes tokens": lambda x, g, w, o: x + F.linear(x.softmax(1), w),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    _, layouts, add = traced(NEAR_MISSES[name])
    assert residual_at(add, layouts) is None


def test_the_addition_of_modulate_is_none():
    """x * (1 + scale) + shift: the other operand is no stream."""
    gm, layouts, _ = traced(lambda x, g, w, o: F.layer_norm(x, (D,)) * (1 + g.unsqueeze(1)) + g.unsqueeze(1))
    assert [residual_at(add, layouts) for add in nodes_of(gm, aten.add)] == [None, None]


def test_the_gates_own_product_is_no_output():
    """A gate that itself comes from the branch's path is part of the branch."""
    gm, layouts, add = traced(lambda x, g, w, o: x + branch(x, w).sigmoid() * branch(x, w))
    residual = residual_at(add, layouts)
    assert residual is not None
    assert [residual.output] == nodes_of(gm, aten.mul)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, g, w, o: branch(x, w) * 2,
        lambda x, g, w, o: o + branch(x, w),
        lambda x, g, w, o: x + (h := branch(x, w)) + h.relu(),
    ],
    ids=["no addition", "another stream", "a path that forks"],
)
def test_an_anchor_without_a_residual(function):
    gm, _, _ = traced(function)
    assert residual_around(nodes_of(gm, aten.linear)[0]) is None


def rms(y: Tensor) -> Tensor:
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)


def layer_norm(y: Tensor) -> Tensor:
    centered = y - y.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()


FORKS = {
    "a norm by the root of the mean square": lambda x, g, w, o: x + rms(branch(x, w)),
    "a norm with a weight and a gate": lambda x, g, w, o: x + g.tanh().unsqueeze(1) * (rms(branch(x, w)) * w[0]),
    "a norm in higher precision": lambda x, g, w, o: x + (rms((y := branch(x, w)).double()) * w[0]).to(y.dtype),
    "a norm with a mean": lambda x, g, w, o: x + g.unsqueeze(1) * layer_norm(branch(x, w)),
    "two norms": lambda x, g, w, o: rms(layer_norm(branch(x, w))) + x,
    "a network of its own": lambda x, g, w, o: x + ((y := branch(x, w)) + F.linear(y, w).relu()),
    "halves that gate each other": lambda x, g, w, o: (
        x + F.linear((y := branch(x, w))[..., :2] * y[..., 2:].sigmoid(), w[:, :2])
    ),
}


@pytest.mark.parametrize("name", FORKS)
def test_a_path_that_forks_and_meets_again_is_one_branch(name):
    gm, layouts, add = traced(FORKS[name])
    residual = residual_around(nodes_of(gm, aten.linear)[0])
    assert residual is not None
    assert (residual.stream, residual.add) == (placeholders(gm)[0], add)
    assert residual == residual_at(add, layouts)


FORKS_THAT_STAY = {
    "read beside the addition": lambda x, g, w, o: torch.cat([x + rms(y := branch(x, w)), y], -1),
    "read after the addition": lambda x, g, w, o: (x + rms(y := branch(x, w))) * y.sigmoid() + x,
    "an addition to the stream within": lambda x, g, w, o: x + ((x + (y := branch(x, w))) * y.sigmoid()),
    "an attention within": lambda x, g, w, o: x + ((y := branch(x, w)) + attend(y)),
    "queries and keys of an attention": lambda x, g, w, o: (
        x + F.scaled_dot_product_attention(y := branch(x, w)[:, None], y * 2, y)[:, 0]
    ),
}


@pytest.mark.parametrize("name", FORKS_THAT_STAY)
def test_near_miss_of_a_fork(name):
    gm, _, _ = traced(FORKS_THAT_STAY[name])
    assert residual_around(nodes_of(gm, aten.linear)[0]) is None


def joint(x: Tensor, g: Tensor, w: Tensor, o: Tensor, cut=lambda z: (z[:, :N], z[:, N:])) -> Tensor:
    """One product over the tokens of both x and o, each of which gets its part."""
    one, other = cut(F.linear(torch.cat([x, o], 1), w))
    return torch.cat([x + g[:, None] * one, o + F.relu(other)], 1)


def test_a_value_cut_into_the_tokens_of_two_streams_ends_in_two_branches():
    gm, _, _ = traced(joint)
    found = residuals_around(nodes_of(gm, aten.linear)[0])
    x, _, _, o = placeholders(gm)
    assert [residual.stream for residual in found] == [x, o]
    assert [residual.add for residual in found] == nodes_of(gm, aten.add)
    assert found[0].output in nodes_of(gm, aten.slice)
    assert [found[1].output] == nodes_of(gm, aten.relu)
    assert residual_around(nodes_of(gm, aten.linear)[0]) is None


@pytest.mark.parametrize(
    "cut",
    [
        lambda z: (z[:, :N], z[:, N - 1 : -1]),
        lambda z: (z[:, :N], z.sigmoid()[:, N:]),
        lambda z: (z[:, :N], z[:, N:] * 0 + z[:, :N]),
    ],
    ids=["parts that overlap", "another reader", "a part read twice"],
)
def test_near_miss_of_two_branches(cut):
    gm, _, _ = traced(lambda *inputs: joint(*inputs, cut=cut))
    assert residuals_around(nodes_of(gm, aten.linear)[0]) == []


def test_parts_that_meet_again_are_no_two_branches():
    """A gate cut off the same projection."""
    gm, _, _ = traced(lambda x, g, w, o: x[..., :2] + (z := branch(x, w))[..., :2] * z[..., 2:])
    assert residuals_around(nodes_of(gm, aten.linear)[0]) == []


# What enters a branch


def entering(function: Callable[..., Tensor]) -> fx.Node:
    """What enters the branch of a function x + f(x) with x (2, 4, 8), a scale (8,) and weights (8, 8)."""
    gm = exported(function, torch.randn(2, 4, 8), torch.randn(8), torch.randn(8, 8))
    stream, (add,) = placeholders(gm)[0], outputs(gm)
    return branch_input(Residual(stream, next(arg for arg in add.all_input_nodes if arg is not stream), add))


def test_the_stream_after_norm_and_modulation_enters_a_branch():
    """Views and casts between modulation and product do not count: they are how the product wants its rows."""
    node = entering(
        lambda x, scale, weight: (
            x + ((F.layer_norm(x, (8,)) * scale + 1).reshape(-1, 8).double() @ weight.double()).float().view_as(x)
        )
    )
    assert node.target is aten.add.Tensor and node.all_input_nodes[0].target is aten.mul.Tensor


def test_where_a_branch_has_neither_the_stream_itself_enters_it():
    assert entering(lambda x, scale, weight: x + x @ weight).op == "placeholder"
    assert entering(lambda x, scale, weight: x + x.relu() * scale).op == "placeholder"


def test_a_product_that_makes_the_modulation_is_not_where_the_stream_enters():
    node = entering(lambda x, scale, weight: x + (x * (scale @ weight)) @ weight)
    assert node.target is aten.mul.Tensor
