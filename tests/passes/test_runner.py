"""The runner of passes, and what the normalizing passes write alike, besides views and attention."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F

from moeca_compile.passes.export import to_functional_aten
from moeca_compile.passes.runner import PASSES, PassError, normalize, run_passes
from tests.harness import Captured, exported, nodes_of, ops

aten = torch.ops.aten
X, G, Y = torch.randn(2, 5, 4), torch.randn(2, 1, 4), torch.randn(2, 5, 4)

REWRITTEN = {
    "dropout in eval mode": (lambda x, g, y: F.dropout(x, 0.1, False) + y, {"add": 1}),
    "dropout of nothing": (lambda x, g, y: F.dropout(x, 0.0, True) + y, {"add": 1}),
    "addcmul": (lambda x, g, y: torch.addcmul(x, g, y), {"add": 1, "mul": 1}),
    "a scaled addcmul": (lambda x, g, y: torch.addcmul(x, g, y, value=0.3), {"add": 1, "mul": 1}),
    "a linear of flat rows": (
        lambda x, g, y: F.linear(x.view(10, 4), y[0]).view(2, 5, 5),
        {"linear": 1, "reshape": 1, "select": 1},
    ),
    "a linear of flat rows that were heads": (
        lambda x, g, y: F.linear(x.view(2, 5, 2, 2).transpose(0, 1).reshape(10, 4), y[0]).view(5, 2, 5),
        {"linear": 1, "reshape": 2, "transpose": 1, "clone": 1, "select": 1},
    ),
    "addcmul in place": (lambda x, g, y: (x * 2).addcmul_(y, g), {"add": 1, "mul": 2}),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten(name):
    function, expected = REWRITTEN[name]
    gm = exported(function, X, G, Y)
    normalize(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert ops(gm) == expected
    torch.testing.assert_close(gm(X, G, Y)[0], function(X, G, Y))


def test_a_linear_whose_flat_rows_are_wanted_stays():
    gm = exported(lambda x, g, y: ((z := F.linear(x.view(10, 4), y[0])).view(2, 5, 5), z), X, G, Y)
    normalize(gm.graph)
    assert ops(gm) == {"linear": 1, "reshape": 2, "select": 1}


def test_live_dropout_stays():
    gm = exported(lambda x, g, y: F.dropout(x, 0.1, True), X, G, Y)
    before = ops(gm)
    normalize(gm.graph)
    assert ops(gm) == before


def test_the_order_and_the_counts_of_a_model(graph: Captured):
    """Splits: in each of 4 blocks 6 modulations and 4 halves of rotated heads, and 2 modulations at the end."""
    seen = []
    gm = to_functional_aten(graph.gm, graph.inputs)
    results = normalize(gm.graph, after=lambda result, graph: seen.append((result, len(graph.nodes))))
    assert [(result.name, result.matches) for result in results] == [
        ("drop_idle_dropouts", 0),
        ("split_products_from_sums", 0),
        ("drop_unread_operands", 0),
        ("collapse_views", 4),
        ("split_to_slices", 42),
        ("unflatten_linears", 0),
        ("fuse_attention", 0),
        ("flatten_streams", 0),
        ("name_attention_arguments", 0),
        ("reshape_views", 15),
    ]
    assert [result.name for result in results] == [each.__name__ for each in PASSES]
    assert tuple(result for result, _ in seen) == results, "the observer saw each of them, in order"
    assert seen[-1][1] == len(gm.graph.nodes) < seen[0][1], "and the graph as it was after that pass"
    assert all(result.seconds > 0 for result in results)


def test_a_result_is_frozen():
    (result,) = run_passes(exported(lambda x: x + 1, X).graph, [lambda graph: 0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.matches = 1  # type: ignore[misc]


def relu_to_double(graph):
    """Leaves what it took the place of as dead code."""
    for relu in graph.find_nodes(op="call_function", target=aten.relu.default):
        with graph.inserting_after(relu):
            relu.replace_all_uses_with(graph.call_function(aten.mul.Tensor, (relu.args[0], 2)))
        return 1
    return 0


def test_dead_code_is_eliminated_between_passes():
    counts = []

    def counting(graph):
        counts.append(len(graph.find_nodes(op="call_function", target=aten.relu.default)))
        return 0

    gm = exported(lambda x: x.relu().relu(), X)
    results = run_passes(gm.graph, [counting, relu_to_double, counting, relu_to_double, counting])
    assert counts == [2, 1, 0]
    assert [result.matches for result in results] == [0, 1, 0, 1, 0]
    gm.recompile()
    assert torch.equal(gm(X)[0], 4 * X)


def moves_the_output_up(graph):
    """Breaks the order, and says that it did nothing."""
    first, output = next(iter(graph.nodes)), graph.output_node()
    first.append(output)
    return 0


def calls_what_cannot_be_called(graph):
    graph.output_node().prev.target = "relu"
    return 1


@pytest.mark.parametrize("broken", [moves_the_output_up, calls_what_cannot_be_called])
def test_a_pass_that_breaks_the_graph_is_named(broken):
    graph, seen = exported(lambda x: x.relu(), X).graph, []
    with pytest.raises(PassError, match=f"the pass {broken.__name__} left a broken graph: [^\n]+$"):
        run_passes(graph, [relu_to_double, broken, relu_to_double], lambda result, _: seen.append(result.name))
    assert seen == ["relu_to_double"], "no pass ran on the broken graph"


def test_each_pass_is_logged_for_who_debugs(caplog):
    gm = exported(REWRITTEN["addcmul"][0], X, G, Y)
    with caplog.at_level(logging.DEBUG, logger="moeca_compile.passes.runner"):
        normalize(gm.graph)
    lines = [record.getMessage() for record in caplog.records if record.name == "moeca_compile.passes.runner"]
    assert len(lines) == len(PASSES)
    assert lines[1].startswith("split_products_from_sums: 1 match")


def test_a_second_run_finds_nothing_to_do():
    for function, _ in REWRITTEN.values():
        gm = exported(function, X, G, Y)
        normalize(gm.graph)
        assert not any(result.matches for result in normalize(gm.graph))


def test_arguments_of_attention_are_counted_where_they_were_not_named_alike():
    def function(x, g, y):
        q = x[:, None]
        one = F.scaled_dot_product_attention(q, q, value=q, attn_mask=None, dropout_p=0.0)
        return F.scaled_dot_product_attention(one, q, q, scale=0.5)

    gm = exported(function, X, G, Y)
    first = next(iter(nodes_of(gm, aten.scaled_dot_product_attention)))
    first.args, first.kwargs = first.args[:2], {"value": first.args[2], "attn_mask": None, "dropout_p": 0.0}
    matches = {result.name: result.matches for result in normalize(gm.graph)}
    assert matches["name_attention_arguments"] == 1
    assert [node.kwargs for node in nodes_of(gm, aten.scaled_dot_product_attention)] == [{}, {"scale": 0.5}]
    gm.recompile()
    torch.testing.assert_close(gm(X, G, Y)[0], function(X, G, Y))
