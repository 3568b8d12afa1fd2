"""What needs the host in a graph is found, each by its own rule, and what does not is let pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

import moeca_compile.backend  # noqa: F401  (registers the ops)
from moeca_compile.passes.analysis.host_ops import DENIED, host_ops, ops_without_kernel

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def graph_of(target, *arguments, device=CPU) -> fx.Graph:
    """One op on inputs like `arguments`; what it gives lies on the device of the first."""
    graph = fx.Graph()
    with FakeTensorMode(allow_non_fake_inputs=True):

        def node(value):
            if not isinstance(value, Tensor):
                return value
            found = graph.placeholder(f"input_{len(graph.nodes)}")
            found.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
            return found

        args = fx.node.map_aggregate(arguments, node)
        call = graph.call_function(target, tuple(args))
        call.meta["val"] = torch.empty(1, device=device)
    graph.output(call)
    return graph


ONE, MASK, PLACES = torch.ones(4), torch.ones(4, dtype=torch.bool), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize("target", DENIED, ids=str)
def test_denied_ops_are_found(target):
    (found,) = host_ops(graph_of(target, ONE), CPU)
    assert found == f"{target} {DENIED[target]}"


@pytest.mark.parametrize(
    "target", [aten._unique2.default, aten.unique_dim.default, aten.equal.default, aten.nonzero.default], ids=str
)
def test_so_are_ops_whose_tags_say_so(target):
    assert len(host_ops(graph_of(target, ONE), CPU)) == 1


def test_masks_for_indices_are_counted_and_positions_are_not():
    assert host_ops(graph_of(aten.index.Tensor, ONE, [PLACES]), CPU) == []
    assert host_ops(graph_of(aten.index.Tensor, ONE, [MASK]), CPU) == ["aten.index.Tensor counts a mask"]
    assert host_ops(graph_of(aten.index_put.default, ONE, [None, MASK], ONE), CPU) != []
    assert host_ops(graph_of(aten.index_put.default, ONE, [PLACES], ONE), CPU) == []


@pytest.mark.parametrize(
    "target", [aten.sort.stable, aten.topk.default, aten.scatter.src, aten.rand.default], ids=str
)
def test_ops_that_stay_on_the_device_pass(target):
    assert host_ops(graph_of(target, ONE), CPU) == []


def test_what_lies_on_the_cpu_is_found_beside_a_device():
    with FakeTensorMode():
        away = torch.empty(4, device=CUDA)
    assert host_ops(graph_of(aten.add.Tensor, away, away, device=CUDA), CUDA) == []
    assert host_ops(graph_of(aten.add.Tensor, away, ONE, device=CUDA), CUDA) == ["placeholder input_1 is on cpu"]
    assert host_ops(graph_of(aten.neg.default, away), CUDA) == ["aten.neg.default is on cpu"]
    other = torch.device("cuda", 1)
    assert host_ops(graph_of(aten.neg.default, away, device=other), CUDA) == ["aten.neg.default is on cuda:1"]


def test_ops_of_the_package_without_a_kernel_of_the_device_are_named():
    graph = graph_of(torch.ops.moeca.fixed_k_outputs.default, [ONE], PLACES)
    assert ops_without_kernel(graph, CPU) == ["moeca.fixed_k_outputs.default"]
    assert host_ops(graph, CPU) == []
    assert ops_without_kernel(graph_of(aten.neg.default, ONE), CPU) == []
