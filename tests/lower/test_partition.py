"""Cutting a graph at its boundaries: which partitions are one subgraph, and what each takes and hands on."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from moeca_compile._torch_private import trace_to_graph
from moeca_compile.lower.executor import PartitionedExecutor
from moeca_compile.lower.partition import Call, partition_graph, whole_graph

alias = torch.ops.aten.alias


def chain_of(gm: fx.GraphModule) -> tuple[list[Call], PartitionedExecutor]:
    calls = partition_graph(gm)
    return calls, PartitionedExecutor(gm, calls, {call.subgraph: call.subgraph.module() for call in calls})


def forms(calls: list[Call]) -> list[int]:
    """The calls' subgraphs, numbered in order of first use."""
    numbers: dict[object, int] = {}
    return [numbers.setdefault(call.subgraph, len(numbers)) for call in calls]


def check(function, *inputs: Tensor) -> list[Call]:
    """Trace, cut and run `function`; the calls, once they have given what it gives."""
    calls, chain = chain_of(trace_to_graph(function, *inputs))
    for got, want in zip(chain(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(got, want, atol=0, rtol=0)
    assert all(node.target is not alias.default for call in calls for node in call.nodes)
    return calls


def layer(x: Tensor, weight: Tensor) -> Tensor:
    return alias(x + (x @ weight).tanh())


X, WEIGHTS = torch.randn(3, 4), [torch.randn(4, 4) for _ in range(5)]


def test_equal_stretches_are_one_subgraph():
    def function(x, *weights):
        x = alias(x * 2)
        for weight in weights:
            x = layer(x, weight)
        return [x.sum()]

    calls = check(function, X, *WEIGHTS)
    assert forms(calls) == [0, 1, 1, 1, 1, 1, 2]
    assert [len(call.arguments) for call in calls] == [1, 2, 2, 2, 2, 2, 1]


def test_a_constant_or_a_shape_makes_another_subgraph():
    def function(x, y, *weights):
        x = layer(alias(x), weights[0])
        x = alias(x + (x @ weights[1]).tanh() * 2)
        x = layer(x, weights[2])
        y = layer(y, weights[3])
        return [x, y]

    calls = check(function, X, torch.randn(2, 4), *WEIGHTS[:4])
    assert forms(calls) == [0, 1, 0, 2]


def test_another_stride_makes_another_subgraph():
    def function(x, *weights):
        for weight in weights:
            x = layer(x, weight)
        return [x]

    turned = [weight.t() if i == 1 else weight for i, weight in enumerate(WEIGHTS[:3])]
    assert forms(check(function, X, *turned)) == [0, 1, 0]


def test_neighbors_without_their_like_are_joined():
    def function(x, a, b, c):
        x = alias(x @ a)
        x = alias((x @ b).tanh())
        return [x + c]

    assert len(check(function, X, *WEIGHTS[:2], X)) == 1


def test_what_is_kept_of_a_layer_is_computed_in_its_partition():
    def function(x, *weights):
        kept = []
        for weight in weights:
            inner = (x @ weight).tanh()
            kept.append(inner)
            x = alias(x + inner)
        half = torch.full((), 0.5)  # needs nothing, so it goes wherever it is wanted
        return [x.sum(), *(inner.relu() * half for inner in kept)]

    calls = check(function, X, *WEIGHTS)
    assert forms(calls) == [0, 1, 1, 1, 1, 2]  # the first partition makes `half` for all
    assert [len(call.results) for call in calls[1:-1]] == [2, 2, 2, 2]
    assert len(calls[-1].arguments) == 1  # of the layers, the last partition sees their sum alone


def test_a_unit_hands_on_what_any_of_its_stretches_has_to():
    def function(x, *weights):
        inner = []
        for weight in weights:
            inner.append((x @ weight).tanh())
            x = alias(x + inner[-1])
        return [x, inner[2]]

    calls = check(function, X, *WEIGHTS)
    assert forms(calls) == [0] * 5
    assert all(len(call.results) == 2 for call in calls)


def test_parts_stay_with_what_they_are_parts_of():
    def function(x, *weights):
        first, second = x.chunk(2, dim=1)
        x = alias(x * 2)
        for weight in weights:
            x = layer(x, weight)
        return [x + second.sum(), first]

    check(function, X, *WEIGHTS)


def test_what_reads_a_value_that_is_written_to_keeps_its_place():
    library = torch.library.Library("moeca_outline_test", "FRAGMENT")
    library.define("double(Tensor(a!) x) -> Tensor")
    library.impl("double", lambda x: x.mul_(2).sum(), "CompositeExplicitAutograd")
    torch.library.register_fake("moeca_outline_test::double", lambda x: x.new_empty(()), lib=library)

    def function(x, state, *weights):
        for weight in weights:
            x = layer(x, weight)
        total = torch.ops.moeca_outline_test.double(state)
        return [alias(x) + total, state + 1]

    calls, chain = chain_of(trace_to_graph(function, X, torch.ones(2), *WEIGHTS))
    _, after = chain(X, torch.ones(2), *WEIGHTS)
    assert after.tolist() == [3.0, 3.0]
    assert forms(calls)[:5] == [0] * 5


def test_inputs_and_constants_are_returned_as_they_are():
    def function(x, weight):
        return [x, alias(x @ weight), torch.tensor([1.0, 2.0])]

    check(function, X, WEIGHTS[0])


def test_examples_have_the_layout_of_the_inputs():
    inputs = torch.zeros(4, 4, dtype=torch.bfloat16).t(), torch.zeros(4, 4, dtype=torch.bfloat16)
    calls = partition_graph(trace_to_graph(lambda x, w: [layer(x, w)], *inputs))
    x, weight = calls[0].subgraph.examples()
    assert (x.stride(), x.dtype) == ((1, 4), torch.bfloat16)
    assert weight.stride() == (4, 1)


def test_an_uncut_graph_is_one_call():
    def function(x, *weights):
        for weight in weights:
            x = layer(x, weight)
        return [x.sum(), x]

    gm = trace_to_graph(function, X, *WEIGHTS)
    calls = whole_graph(gm)
    chain = PartitionedExecutor(gm, calls, {call.subgraph: call.subgraph.module() for call in calls})
    assert len(calls) == 1
    assert all(node.target is not alias.default for node in calls[0].nodes)
    for got, want in zip(chain(X, *WEIGHTS), function(X, *WEIGHTS), strict=True):
        torch.testing.assert_close(got, want, atol=0, rtol=0)


def test_what_all_stretches_read_is_computed_in_front():
    """Conditioning that the first block happens to compute, and that the head reads too."""

    def function(x, c, *weights):
        condition = (c * c).tanh()
        x = alias(x.sin())
        for weight in weights:
            x = alias(x + (x @ weight) * condition)
        return [x * condition.exp()]

    calls = check(function, X, X, *WEIGHTS)
    assert forms(calls) == [0, 1, 1, 1, 1, 1, 2]


def test_what_is_made_of_all_layers_stays_behind_them():
    def function(x, *weights):
        counts = []
        for weight in weights:
            x = alias(x + (x @ weight).tanh())
            counts.append(x.sum())
        return [x, torch.stack(counts)]

    calls = check(function, X, *WEIGHTS)
    assert forms(calls)[1:-1] == [1] * len(calls[1:-1])


def test_what_is_changed_in_place_is_not_computed_in_front():
    """It is read by many partitions, but from the second on only."""

    def function(x, cache, *weights):
        x = alias(x @ weights[0])
        x = alias(x + cache.add_(1.0))
        changed = cache * 2
        for weight in weights:
            x = alias(x @ weight + changed)
        return [x]

    _, chain = chain_of(trace_to_graph(function, X, X, *WEIGHTS))
    torch.testing.assert_close(chain(X, X.clone(), *WEIGHTS), function(X, X.clone(), *WEIGHTS), atol=0, rtol=0)
