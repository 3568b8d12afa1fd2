"""Functional ATen as the passes expect it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeca_compile.passes.export import to_functional_aten
from moeca_compile.passes.listed_parameters import ListedParameters
from tests.harness import Captured, exported, nodes_of, ops, placeholders

EXPERTS = torch.ops.moeca.experts_fixed_k
X, W = torch.randn(2, 6, 8), torch.randn(8, 8)


def test_what_matchers_look_for_stays_whole():
    def function(x: Tensor, w: Tensor) -> Tensor:
        x = F.layer_norm(F.linear(x, w), (8,))
        q = x.view(2, 6, 2, 4).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(2, 6, 8)
        return F.rms_norm(x.topk(4)[0], (4,)).softmax(-1)

    found = ops(exported(function, X, W))
    names = {"linear", "layer_norm", "scaled_dot_product_attention", "topk", "rms_norm", "softmax"}
    assert {name: found[name] for name in names} == dict.fromkeys(names, 1)


def test_mutation_becomes_functional():
    def function(x: Tensor) -> Tensor:
        y = x * 2
        y.add_(1)
        y[:, 0] = 0
        return y

    gm = exported(function, X)
    assert not [name for name in ops(gm) if name.endswith("_") or name == "copy_"]
    (found,) = gm(X)
    assert torch.equal(found, function(X))


def test_every_node_has_a_fake_value_and_no_assertion_is_left(graph: Captured):
    gm = to_functional_aten(graph.gm, graph.inputs)
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert all("val" in node.meta for node in nodes)
    assert not [node for node in nodes if "assert" in str(node.target)]
    assert len(placeholders(gm)) == len(graph.inputs)
    assert ops(gm)["experts_fixed_k"] == ops(gm)["expert_rows"] == 2


def test_a_graph_with_markers_is_what_it_would_be_were_all_experts_traced(graph: Captured, monkeypatch):
    found = to_functional_aten(graph.gm, graph.inputs)
    monkeypatch.setattr(ListedParameters, "of", lambda _: None)
    wanted = to_functional_aten(graph.gm, graph.inputs)
    assert ops(found) == ops(wanted)
    assert found.meta["mutated_inputs"] == wanted.meta["mutated_inputs"]
    for one, other in zip(placeholders(found), placeholders(wanted), strict=True):
        assert one.meta["val"].shape == other.meta["val"].shape and len(one.users) == len(other.users)
    position = {node: i for i, node in enumerate(placeholders(found))}
    for one, other in zip(nodes_of(found, EXPERTS), nodes_of(wanted, EXPERTS), strict=True):
        beside = {node: i for i, node in enumerate(placeholders(wanted))}
        assert [position[node] for node in one.args[4]] == [beside[node] for node in other.args[4]]
