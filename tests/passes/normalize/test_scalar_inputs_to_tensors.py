"""Numbers that change from call to call become tensors; those that are sizes or bounds stay numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moeca_compile.passes.export import to_functional_aten
from moeca_compile.passes.normalize.scalar_inputs_to_tensors import scalar_inputs_to_tensors
from tests.harness import RecordingBackend, nodes_of

X = torch.arange(24.0).view(4, 6)


def dynamic_graph(function: Callable[..., Tensor], *numbers: Any) -> tuple[torch.fx.GraphModule, list[Any]]:
    """Dynamo's graph in which the number is an input: it makes one once the number has changed."""
    torch._dynamo.reset()
    backend = RecordingBackend()
    fast = torch.compile(function, backend=backend)
    for number in numbers:
        torch.testing.assert_close(fast(X, number), function(X, number))
    return backend.graphs[-1], list(backend.inputs[-1])


def run(gm: torch.fx.GraphModule, inputs: list[Any], positions: list[int], number: Any) -> Tensor:
    """The rewritten graph through export, on a number that it was not traced with."""
    names = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
    values: list[Any] = []
    for position, (example, value) in enumerate(zip(names, inputs, strict=True)):
        if position in positions:
            values.append(torch.tensor(number))
        elif isinstance(example, Tensor) and example.ndim == 0:
            values.append(torch.tensor(number, dtype=torch.float64))
        else:
            values.append(value if isinstance(value, Tensor) else int(number))
    (found,) = to_functional_aten(gm, values)(*values)
    return found


NUMBERS: dict[str, tuple[Callable[[Tensor, Any], Tensor], tuple[Any, ...], Any]] = {
    "int in full": (lambda x, t: x + torch.full((4, 1), t), (5, 7, 9), 11),
    "int in tensor": (lambda x, t: x * torch.tensor([t]), (5, 7, 9), 11),
    "int times tensor": (lambda x, t: x * t, (5, 7, 9), 11),
    "int with arithmetic": (lambda x, t: x * torch.tensor([1000 - 2 * t]), (5, 7, 9), 11),
    "float times tensor": (lambda x, t: x * t, (0.5, 0.7, 0.9), 0.25),
    "float in tensor": (lambda x, t: x * torch.tensor([t]), (0.5, 0.7, 0.9), 0.25),
    "float in full": (lambda x, t: x + torch.full((4, 1), t), (0.5, 0.7, 0.9), 0.25),
    "float with arithmetic": (lambda x, t: x * torch.tensor([1 - t]), (0.5, 0.7, 0.9), 0.25),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_becomes_a_tensor(name):
    function, numbers, other = NUMBERS[name]
    gm, inputs = dynamic_graph(function, *numbers)
    positions = list(scalar_inputs_to_tensors(gm, inputs).as_tensors)
    assert len(positions) == (1 if isinstance(other, int) else 0)
    gm.graph.lint()
    assert nodes_of(gm, "item") == []
    torch.testing.assert_close(run(gm, inputs, positions, other), function(X, other))


NEAR_MISSES = {
    "a bound of a slice": lambda x, n: x[:, :n] * 2,
    "a size of full": lambda x, n: torch.full((n, 6), 0.5) + x[0],
    "a size of a view": lambda x, n: x.reshape(n, -1) * 2,
    "a dimension": lambda x, n: x.repeat(n, 1),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_number_that_is_a_size_stays_a_number(name):
    function = NEAR_MISSES[name]
    gm, inputs = dynamic_graph(function, 4, 2, 3)
    assert scalar_inputs_to_tensors(gm, inputs) == ((), ())
    gm.graph.lint()
    torch.testing.assert_close(run(gm, inputs, [], 2), function(X, 2))


def test_sizes_of_tensors_are_not_touched():
    torch._dynamo.reset()
    backend = RecordingBackend()
    fast = torch.compile(lambda x: x * x.shape[0], backend=backend)
    for rows in (4, 3, 2):
        torch.testing.assert_close(fast(X[:rows]), X[:rows] * rows)
    gm, inputs = backend.graphs[-1], backend.inputs[-1]
    assert scalar_inputs_to_tensors(gm, inputs) == ((), ())


def test_the_tensor_lies_where_the_model_makes_it():
    """On an accelerator; the number comes from the CPU."""
    gm, inputs = dynamic_graph(lambda x, t: x + torch.full((4, 1), t), 5, 7, 9)
    with FakeTensorMode():
        (made,) = nodes_of(gm, torch.full)
        made.meta["example_value"] = torch.empty(4, 1, dtype=torch.int64, device="cuda")
    scalar_inputs_to_tensors(gm, inputs)
    (cast,) = (node for node in gm.graph.nodes if node.target == "to")
    assert cast.args[1:] == (torch.device("cuda", 0), torch.int64)
