"""A graph as text, and where its regions begin."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from moeca_compile.passes.export import to_functional_aten
from moeca_compile.passes.graph_text import graph_text, region_marks
from moeca_compile.passes.match.match_regions import match_regions
from moeca_compile.passes.match.regions import Regions, Skipped
from moeca_compile.passes.runner import normalize
from tests.harness import Captured, exported, placeholders


@pytest.fixture
def matched(graph: Captured) -> tuple[fx.Graph, Regions]:
    gm = to_functional_aten(graph.gm, graph.inputs)
    normalize(gm.graph)
    arguments = {node for node, user in zip(placeholders(gm), graph.user_inputs, strict=True) if user}
    return gm.graph, match_regions(gm.graph, arguments)


def test_ops_are_written_as_calls_with_what_they_give():
    gm = exported(lambda x, w: F.linear(x, w).split([1, 2], 1)[1], torch.randn(2, 4), torch.randn(3, 4))
    lines = [line for line in graph_text(gm.graph).splitlines() if not line.startswith("#")]
    assert lines == [
        "input arg0_1: float32[2, 4]",
        "input arg1_1: float32[3, 4]",
        "linear: float32[2, 3] = aten.linear.default(arg0_1, arg1_1)",
        "split_with_sizes: (float32[2, 1], float32[2, 2]) = aten.split_with_sizes.default(linear, [1, 2], 1)",
        "getitem_1: float32[2, 2] = operator.getitem(split_with_sizes, 1)",
        "return (getitem_1,)",
    ]


def test_every_kind_of_node_can_be_written():
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_method("mul", (x, 2), {"out": None})
    z = graph.call_module("blocks.0", (y,))
    w = graph.get_attr("scale")
    graph.output({"out": graph.call_function(operator.add, (z, w))})
    lines = graph_text(graph).splitlines()
    assert lines[:4] == ["input x", "mul = x.mul(2, out=None)", "blocks_0 = self.blocks.0(mul)", "scale = self.scale"]
    assert lines[4] == "add = operator.add(blocks_0, scale)"


def test_the_device_is_said_where_it_is_not_the_cpu():
    graph = fx.Graph()
    graph.placeholder("x").meta["val"] = torch.empty(2, device="meta")
    assert graph_text(graph) == "input x: float32[2] on meta\n"


def test_parameters_are_called_as_in_the_model(graph: Captured):
    for gm in (graph.gm, to_functional_aten(graph.gm, graph.inputs)):
        lines = graph_text(gm.graph).splitlines()
        assert "input self.blocks.1.attn.qkv.weight: float32[96, 32]" in lines
        assert "input self.blocks.1.attn.cos: float32[16, 8]" in lines
        assert not any("_modules_" in line for line in lines if not line.startswith("#"))


def test_names_that_do_not_tell_nodes_apart_stay():
    graph = fx.Graph()
    for name in ("l_self_parameters_a_modules_b_", "l_self_modules_a_parameters_b_"):
        graph.placeholder(name)
    assert len(set(graph_text(graph).splitlines())) == 2


def test_inputs_can_be_given_names():
    gm = exported(lambda x, cache: x + cache, torch.ones(2), torch.ones(2))
    text = graph_text(gm.graph, inputs=["x", "cache of blocks.0"])
    assert "aten.add.Tensor(x, cache of blocks.0)" in text
    with pytest.raises(ValueError, match="zip"):
        graph_text(gm.graph, inputs=["x"])


def test_long_lists_of_nodes_are_shown_by_their_ends():
    gm = exported(lambda *inputs: torch.cat(inputs), *torch.ones(9, 1))
    assert "aten.cat.default([arg0_1, arg1_1, arg2_1, ..., arg8_1])" in graph_text(gm.graph)
    gm = exported(lambda x: x.view(1, 1, 1, 1, 1, 1, 1, 1, 2), torch.ones(2))
    assert "[1, 1, 1, 1, 1, 1, 1, 1, 2]" in graph_text(gm.graph), "sizes are all shown"


def test_ops_stand_under_their_module_and_line(graph: Captured):
    lines = graph_text(to_functional_aten(graph.gm, graph.inputs).graph).splitlines()
    (norm,) = (i for i, line in enumerate(lines) if line.startswith("layer_norm_2:"))
    assert lines[norm - 1].startswith("# blocks.1.norm1  dit.py:")
    assert lines[norm - 1].endswith("x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))")


def test_every_region_is_marked_where_it_begins(matched):
    graph, regions = matched
    marks = region_marks(graph, regions)
    found = [(mark, str(node.target)) for node in graph.nodes for mark in marks.get(node, ())]
    assert found == [
        ("attention blocks.0.attn", "aten.layer_norm.default"),
        ("feedforward blocks.0.mlp.fc2", "aten.layer_norm.default"),
        ("attention blocks.1.attn", "aten.layer_norm.default"),
        ("router blocks.1.mlp", "aten.linear.default"),
        ("experts blocks.1.mlp", "moeca.experts_fixed_k.default"),
        ("shared expert blocks.1.mlp.shared_expert.down_proj", "aten.linear.default"),
        ("attention blocks.2.attn", "aten.layer_norm.default"),
        ("feedforward blocks.2.mlp.fc2", "aten.layer_norm.default"),
        ("attention blocks.3.attn", "aten.layer_norm.default"),
        ("router blocks.3.mlp", "aten.linear.default"),
        ("experts blocks.3.mlp", "moeca.experts_fixed_k.default"),
        ("shared expert blocks.3.mlp.shared_expert.down_proj", "aten.linear.default"),
    ]
    text = graph_text(graph, marks)
    assert "\n\n#### router blocks.1.mlp\n# blocks.1.mlp.gate  dit.py:" in text


def test_what_was_skipped_is_marked_in_its_module_or_at_the_top(matched):
    graph, _ = matched
    skipped = (Skipped("experts", "blocks.1.mlp", "why"), Skipped("attention", "", "not known where"))
    marks = region_marks(graph, Regions(skipped=skipped))
    (inside,) = (node for node, found in marks.items() if found == ["skipped experts blocks.1.mlp: why"])
    assert inside.args[0].name.startswith("add") and "gate" in inside.args[1].name, "the router's scores come first"
    assert marks[next(iter(graph.nodes))] == ["skipped attention : not known where"]
