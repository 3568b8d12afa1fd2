"""Expert bodies as capture gives them, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.ops import bodies
from tests.harness import exported


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def gelu_mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)


def graph_of(
    body: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]], width: int, dtype: torch.dtype, rows: int = 1
) -> fx.GraphModule:
    """ATen ops of a body on `rows` inputs of that width and parameters of these shapes; returns one value."""
    inputs = [torch.zeros(3, width, dtype=dtype) for _ in range(rows)]
    graph = exported(body, *inputs, *(torch.zeros(shape, dtype=dtype) for shape in shapes))
    output: Any = next(reversed(graph.graph.nodes))
    output.args = (output.all_input_nodes[0],)
    graph.recompile()
    return graph


def body_of(body: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]], width: int, dtype: torch.dtype) -> str:
    """The key of such a graph, registered."""
    return bodies.register(graph_of(body, shapes, width, dtype))
