"""Evaluation of a graph with some values replaced."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from moeca_compile._torch_private import trace_to_graph
from moeca_compile.passes.rewrite.evaluate import DroppedError, Evaluation
from tests.harness import exported, nodes_of, outputs

aten = torch.ops.aten


def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    doubled = x * 2
    return doubled.sigmoid() + y, doubled.relu()


X, Y = torch.randn(3), torch.randn(3)


def test_it_is_the_function():
    gm = exported(function, X, Y)
    for found, expected in zip(Evaluation(gm.graph, [X, Y], {}).run(), function(X, Y), strict=True):
        assert torch.equal(found, expected)


def test_constants_of_the_models_code_are_read():
    gm = exported(lambda x: x + torch.tensor([1.0, 2.0, 3.0]), X)
    (found,) = Evaluation(gm.graph, [X], {}).run()
    assert torch.equal(found, X + torch.tensor([1.0, 2.0, 3.0]))


def test_a_replacement_takes_the_place_of_its_op_and_is_called_once():
    gm = exported(function, X, Y)
    (doubled,) = nodes_of(gm, aten.mul)
    calls = []
    evaluation = Evaluation(gm.graph, [X, Y], {doubled: lambda: calls.append(1) or torch.ones(3)})
    first, second = evaluation.run()
    assert torch.equal(first, torch.ones(3).sigmoid() + Y)
    assert torch.equal(second, torch.ones(3))
    assert torch.equal(evaluation[doubled], torch.ones(3))
    assert calls == [1]


def test_what_only_a_replaced_node_needs_is_not_computed():
    gm = exported(function, X, Y)
    (sigmoid,), (doubled,) = nodes_of(gm, aten.sigmoid), nodes_of(gm, aten.mul)
    evaluation = Evaluation(gm.graph, [X, Y], {sigmoid: lambda: torch.zeros(3)})
    assert torch.equal(evaluation[outputs(gm)[0]], Y)
    assert doubled not in evaluation.values


def test_replacements_run_in_graph_order_and_may_read_other_values():
    gm = exported(function, X, Y)
    (sigmoid,), (relu,), (doubled,) = (nodes_of(gm, op) for op in (aten.sigmoid, aten.relu, aten.mul))
    order = []

    def read(name):
        return lambda: order.append(name) or evaluation[doubled] + 1

    evaluation = Evaluation(gm.graph, [X, Y], {relu: read("relu"), sigmoid: read("sigmoid")})
    first, second = evaluation.run()
    assert order == ["sigmoid", "relu"]
    assert torch.equal(first, X * 2 + 1 + Y)
    assert torch.equal(second, X * 2 + 1)


def test_instead_asks_what_would_be_and_leaves_what_is():
    gm = exported(function, X, Y)
    (doubled,), (sigmoid,), (relu,) = (nodes_of(gm, op) for op in (aten.mul, aten.sigmoid, aten.relu))
    evaluation = Evaluation(gm.graph, [X, Y], {})
    other = torch.tensor([-1.0, 0.0, 1.0])
    found, rectified, input_itself = evaluation.evaluate_with({doubled: other}, [outputs(gm)[0], relu, doubled])
    assert torch.equal(found, other.sigmoid() + Y)
    assert torch.equal(rectified, other.relu())
    assert torch.equal(input_itself, other)
    assert sigmoid not in evaluation.values
    assert torch.equal(evaluation.run()[0], (X * 2).sigmoid() + Y)


def test_instead_gives_what_does_not_depend_on_the_change_as_it_is():
    gm = exported(function, X, Y)
    (sigmoid,), (relu,) = nodes_of(gm, aten.sigmoid), nodes_of(gm, aten.relu)
    evaluation = Evaluation(gm.graph, [X, Y], {})
    (found,) = evaluation.evaluate_with({sigmoid: torch.zeros(3)}, [relu])
    assert torch.equal(found, (X * 2).relu())


def test_instead_with_two_values_changed():
    gm = exported(lambda x, y: (x * 2 + y.relu()) * 3, X, Y)
    (relu,), (add,) = nodes_of(gm, aten.relu), nodes_of(gm, aten.add)
    doubled = nodes_of(gm, aten.mul)[0]
    evaluation = Evaluation(gm.graph, [X, Y], {})
    found, total = evaluation.evaluate_with({doubled: X, relu: Y}, [outputs(gm)[0], add])
    torch.testing.assert_close(found, (X + Y) * 3)
    torch.testing.assert_close(total, X + Y)


def test_a_long_chain_needs_no_recursion():
    def deep(x: Tensor) -> Tensor:
        for _ in range(1200):
            x = x + 1
        return x

    gm = exported(deep, X)
    torch.testing.assert_close(Evaluation(gm.graph, [X], {})[outputs(gm)[0]], X + 1200)


def test_a_replacement_may_ask_for_what_it_replaces():
    gm = exported(function, X, Y)
    (doubled,) = nodes_of(gm, aten.mul)
    evaluation = Evaluation(gm.graph, [X, Y], {doubled: lambda: evaluation[doubled] + 1})
    assert torch.equal(evaluation[doubled], X * 2 + 1)
    assert torch.equal(evaluation.run()[1], (X * 2 + 1).relu())


def test_instead_with_several_known_values_looks_past_none_of_them():
    gm = exported(lambda x: ((x * 2).sigmoid() + x).relu() * 3, X)
    (first, last), (sigmoid,), (relu,) = (nodes_of(gm, op) for op in (aten.mul, aten.sigmoid, aten.relu))
    evaluation = Evaluation(gm.graph, [X], {relu: lambda: torch.zeros(3)})
    known = {first: X + 5, sigmoid: X + 1}
    assert torch.equal(evaluation.evaluate_with(known, [relu])[0], (X + 1 + X).relu())
    (last_value,) = evaluation.evaluate_with({**known, relu: X}, [last])
    assert torch.equal(last_value, X * 3)


def chain(x: Tensor) -> tuple[Tensor]:
    for _ in range(6):
        x = (x + 1).relu()
    return (x,)


def live_values(evaluation: Evaluation, watched) -> list[int]:
    """How many values the evaluation holds whenever a watched node is computed."""
    counts = []
    evaluation.replacements = {
        node: lambda node=node: counts.append(len(evaluation.values)) or evaluation[node] for node in watched
    }
    evaluation.reads = dict.fromkeys(watched, ())
    evaluation.run()
    return counts


def test_a_value_is_dropped_after_its_last_reader():
    gm = exported(chain, X)
    evaluation = Evaluation(gm.graph, [X], {})
    assert max(live_values(evaluation, nodes_of(gm, aten.relu))) <= 3  # the input, a sum and a rectified one
    assert set(evaluation.values) == {nodes_of(gm, aten.relu)[-1], *gm.graph.find_nodes(op="placeholder")}


def test_a_dropped_tensor_is_freed():
    gm = exported(chain, X)
    references = []
    first, *_ = nodes_of(gm, aten.add)
    evaluation = Evaluation(gm.graph, [X], {}, reads={})

    def spy() -> Tensor:
        value = evaluation[first]
        references.append(weakref.ref(value))
        return value

    evaluation.replacements, evaluation.reads = {first: spy}, {first: ()}
    evaluation.run()
    gc.collect()
    assert references[0]() is None


def test_fake_values_are_never_dropped_so_that_a_trace_has_nothing_twice():
    gm = exported(chain, X)
    held = []

    def traced(x: Tensor) -> list[Tensor]:
        evaluation = Evaluation(gm.graph, [x], {})
        out = evaluation.run()
        held.append(len(evaluation.values))
        assert evaluation[nodes_of(gm, aten.add)[0]] is not None
        return list(out)

    graph = trace_to_graph(traced, X)
    assert held == [13]
    assert len(graph.graph.find_nodes(op="call_function", target=aten.add.Tensor)) == 6


def test_a_dropped_value_is_computed_anew_for_whom_it_is_asked_by():
    gm = exported(chain, X)
    evaluation = Evaluation(gm.graph, [X], {})
    evaluation.run()
    node = nodes_of(gm, aten.add)[3]
    assert node in evaluation.dropped
    assert torch.equal(evaluation[node], X.add(1).relu().add(1).relu().add(1).relu().add(1))


def test_what_is_read_afterwards_is_kept():
    gm = exported(chain, X)
    node = nodes_of(gm, aten.add)[3]
    evaluation = Evaluation(gm.graph, [X], {}, kept=[node])
    evaluation.run()
    assert node in evaluation.values


def test_a_random_value_is_kept_since_it_would_be_another_one_the_second_time():
    gm = exported(lambda x: ((torch.rand_like(x) + x).relu(),), X)
    evaluation = Evaluation(gm.graph, [X], {})
    (out,) = evaluation.run()
    assert torch.equal(evaluation[nodes_of(gm, aten.add)[0]].relu(), out)


def test_a_replacement_may_read_what_its_node_is_computed_from_until_it_is_called():
    gm = exported(chain, X)
    early, late = nodes_of(gm, aten.relu)[1], nodes_of(gm, aten.relu)[4]
    evaluation = Evaluation(gm.graph, [X], {}, reads={late: ()})
    evaluation.replacements = {late: lambda: evaluation[early] * 2}
    (out,) = evaluation.run()
    assert torch.equal(out, (X.add(1).relu().add(1).relu() * 2 + 1).relu())
    assert early not in evaluation.values


def test_what_a_declared_replacement_gave_is_dropped_and_not_computed_twice():
    gm = exported(chain, X)
    node, calls = nodes_of(gm, aten.relu)[1], []
    evaluation = Evaluation(gm.graph, [X], {node: lambda: calls.append(1) or X}, reads={node: ()})
    evaluation.run()
    with pytest.raises(DroppedError, match="Declare"):
        evaluation[node]
    assert calls == [1]
