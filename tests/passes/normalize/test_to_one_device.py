"""What is computed on the CPU beside an accelerator moves there, unless something has to stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from moeca_compile.lower.upload import upload
from moeca_compile.passes.analysis.host_ops import host_ops
from moeca_compile.passes.normalize.to_one_device import to_one_device
from tests.harness import exported, ops, placeholders

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def on_cuda(x: Tensor, t: Tensor) -> Tensor:
    angles = t * torch.arange(4, dtype=torch.float32)
    return x * angles.to(x.device).sin()


def moved(function, arguments=(True, True)) -> tuple[fx.GraphModule, fx.GraphModule, tuple[int, ...]]:
    """The graph of a function of (x on CUDA, t on the CPU) before and after, and what is to be copied."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [torch.empty(4, device=CUDA), torch.empty(())]
        before = exported(function, *inputs)
        return before, *to_one_device(before, inputs, arguments, CUDA)


def test_what_a_timestep_goes_through_moves():
    before, after, copied = moved(on_cuda)
    assert copied == (1,)
    assert len(host_ops(before.graph, CUDA)) >= 3  # the timestep, the table, their product
    assert host_ops(after.graph, CUDA) == []
    assert ops(after) == ops(before)
    assert all(node.meta["val"].device == CUDA for node in after.graph.nodes if node.op == "placeholder")


def test_the_numbers_stay_the_same():
    """The moved graph with its devices said to be the CPU, where there are numbers."""
    _, after, _ = moved(on_cuda)
    for node in after.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, lambda arg: CPU if arg == CUDA else arg)
        node.kwargs = fx.node.map_aggregate(node.kwargs, lambda arg: CPU if arg == CUDA else arg)
    after.recompile()
    x, t = torch.randn(4), torch.tensor(0.3)
    torch.testing.assert_close(after(x, t)[0], on_cuda(x, t))


def test_an_expanded_timestep_is_copied_contiguous():
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [torch.empty(4, device=CUDA), torch.empty(1).expand(4)]
        graph, copied = to_one_device(exported(on_cuda, *inputs), inputs, (True, True), CUDA)
    assert copied == (1,)
    _, time = placeholders(graph)
    assert time.meta["val"].stride() == (1,)
    assert upload(torch.ones(1).expand(4), CPU).stride() == (1,)


def random_on_the_cpu(x: Tensor, t: Tensor) -> Tensor:
    return x + (torch.rand(4) * t).to(x.device)


def output_on_the_cpu(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return x + 1, t * 2


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(random_on_the_cpu, (True, True)), (output_on_the_cpu, (True, True)), (on_cuda, (True, False))],
    ids=["random numbers", "an output", "a weight"],
)
def test_a_graph_in_which_something_has_to_stay_stays_as_it_is(function, arguments):
    before, after, copied = moved(function, arguments)
    assert after is before and copied == ()
    assert host_ops(after.graph, CUDA) != []


def test_a_graph_with_nothing_on_the_cpu_stays_as_it_is():
    with FakeTensorMode():
        inputs = [torch.empty(4, device=CUDA)]
        graph = exported(lambda x: x.sin(), *inputs)
        assert to_one_device(graph, inputs, (True,), CUDA) == (graph, ())
