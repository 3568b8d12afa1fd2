"""Running calls of subgraphs: values are let go of as soon as no later call needs them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from moeca_compile._torch_private import trace_to_graph
from moeca_compile.lower.executor import PartitionedExecutor
from moeca_compile.lower.partition import partition_graph
from moeca_compile.lower.program import trace_step
from moeca_compile.passes.rewrite.kinds import StepKind
from tests.harness import caches_of

alias = torch.ops.aten.alias


def test_intermediate_values_do_not_outlive_their_last_use():
    def function(x, *weights):
        for weight in weights:
            x = alias(x + (x @ weight).tanh())
        return [x]

    inputs = [torch.randn(3, 4), *(torch.randn(4, 4) for _ in range(6))]
    gm = trace_to_graph(function, *inputs)
    calls = partition_graph(gm)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(module):
        def run(*arguments):
            nonlocal most
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            results = module(*arguments)
            alive.extend(map(weakref.ref, results))
            return results

        return run

    chain = PartitionedExecutor(gm, calls, {call.subgraph: watched(call.subgraph.module()) for call in calls})
    (out,) = chain(*inputs)
    torch.testing.assert_close(out, function(*inputs)[0])
    assert len(alive) == 6
    assert most == 1


def test_another_number_of_inputs_is_refused():
    gm = trace_to_graph(lambda x, y: [x + y], torch.ones(2), torch.ones(2))
    chain = PartitionedExecutor(gm, (calls := partition_graph(gm)), {c.subgraph: c.subgraph.module() for c in calls})
    with pytest.raises(TypeError, match="takes 2 inputs, not 3"):
        chain(torch.ones(2), 3, torch.ones(2))


def test_the_blocks_of_a_model_share_their_subgraphs(graph, eager_steps):
    """Four blocks, two of them with experts: attention and MoE are each one subgraph, whatever is kept of them."""
    loop = graph.loop(recipe="moeca-forecast", validate=False)
    traced = trace_step(loop.compiled.function(StepKind()), graph.inputs, *caches_of(loop))
    calls = partition_graph(traced.graph)
    count = {call.subgraph: sum(other.subgraph is call.subgraph for other in calls) for call in calls}
    # embedding with the conditioning of all blocks, head; dense, MoE; attentions
    assert sorted(count.values()) == [1, 1, 2, 2, 4]
