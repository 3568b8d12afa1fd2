"""Expert bodies as capture gives them, tensors and tolerances, for the tests of this folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.ops import bodies
from tests.harness import exported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""On a CPU, Triton's interpreter runs the kernels (tests/conftest.py)."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH, HIDDEN = 6, 10
"""No multiples of 16, and of no block size: every mask in the kernels is at work."""


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def swiglu_with_biases(x: Tensor, g: Tensor, gb: Tensor, u: Tensor, ub: Tensor, d: Tensor, db: Tensor) -> Tensor:
    return F.linear(F.linear(x, u, ub) * F.silu(F.linear(x, g, gb)), d, db)


def gelu_mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)


def exact_gelu_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up)), down)


def relu_mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor) -> Tensor:
    return F.linear(torch.relu(F.linear(x, up, up_bias)), down)


def silu_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.silu(x @ up) @ down


def packed(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ both).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down


def packed_up_first(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
    up, gate = F.linear(x, both).chunk(2, dim=-1)
    return F.linear(up * F.gelu(gate), down)


def packed_by_views(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
    """As capture writes weights that are looked up by expert id."""
    both, down = both.unsqueeze(0).reshape(both.shape), down.unsqueeze(0).reshape(down.shape)
    gate, up = (x.reshape(-1, 1, x.shape[-1]) @ both).chunk(2, dim=-1)
    return ((F.silu(gate) * up) @ down).reshape(-1, down.shape[-1])


def one_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.relu(F.linear(x, weight, bias)).square()


def normed(x: Tensor, up: Tensor, weight: Tensor, bias: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.gelu(F.layer_norm(F.linear(x, up), (up.shape[0],), weight, bias)), down)


def rms_normed(x: Tensor, up: Tensor, weight: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.rms_norm(F.linear(x, up), (up.shape[0],), weight, 1e-6)), down)


def spelled_rms(x: Tensor, scale: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return swiglu(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * scale, gate, up, down)


def modulated(x: Tensor, time: Tensor, mix: Tensor, bias: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As Diff-MoE's: a second row a token shifts, scales and gates."""
    shift, scale, last = F.linear(F.silu(time), mix, bias).chunk(3, dim=-1)
    return last * swiglu(x * (1 + scale) + shift, gate, up, down)


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """No product at all."""
    return x * scale


def one_of_two(x: Tensor, both: Tensor) -> Tensor:
    """Its output is a view of a wider value."""
    return torch.chunk(x @ both, 2, dim=-1)[1]


@dataclass(frozen=True)
class Body:
    """A body with the shapes of an expert's parameters, and whether kernels of ours are all that it runs."""

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    products_only: bool
    rows: int = 1

    def graph(self, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
        return graph_of(self.function, self.shapes, WIDTH, dtype, self.rows)

    @functools.lru_cache  # noqa: B019  (there are as many as in BODIES)
    def key(self, dtype: torch.dtype) -> str:
        return bodies.register(self.graph(dtype))

    def parameters(self, experts: int, dtype: torch.dtype) -> list[Tensor]:
        """Expert-major, each scaled so that every product keeps the magnitude of its input."""
        return [random(shape, dtype) / max(1, shape[-1]) ** 0.5 for shape in self.shapes * experts]


_H, _D = HIDDEN, WIDTH
BODIES = {
    "swiglu": Body(swiglu, ((_H, _D), (_H, _D), (_D, _H)), True),
    "swiglu with biases": Body(swiglu_with_biases, ((_H, _D), (_H,), (_H, _D), (_H,), (_D, _H), (_D,)), True),
    "gelu": Body(gelu_mlp, ((_H, _D), (_H,), (_D, _H), (_D,)), True),
    "exact gelu": Body(exact_gelu_mlp, ((_H, _D), (_D, _H)), True),
    "relu": Body(relu_mlp, ((_H, _D), (_H,), (_D, _H)), True),
    "silu": Body(silu_mlp, ((_D, _H), (_H, _D)), True),
    "packed": Body(packed, ((_D, 2 * _H), (_H, _D)), True),
    "packed, up first": Body(packed_up_first, ((2 * _H, _D), (_D, _H)), True),
    "packed, by views": Body(packed_by_views, ((_D, 2 * _H), (_H, _D)), True),
    "one linear": Body(one_linear, ((_D, _D), (_D,)), False),
    "layer norm": Body(normed, ((_H, _D), (_H,), (_H,), (_D, _H)), False),
    "rms norm": Body(rms_normed, ((_H, _D), (_H,), (_D, _H)), False),
    "spelled rms norm": Body(spelled_rms, ((_D,), (_H, _D), (_H, _D), (_D, _H)), False),
    "modulated": Body(modulated, ((3 * _D, _D), (3 * _D,), (_H, _D), (_H, _D), (_D, _H)), False, rows=2),
    "scaled": Body(scaled, ((_D,),), False),
    "one of two": Body(one_of_two, ((_D, 2 * _D),), False),
}


def graph_of(
    body: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]], width: int, dtype: torch.dtype, rows: int = 1
) -> fx.GraphModule:
    """ATen ops of a body on `rows` inputs of that width and parameters of these shapes; returns one value."""
    inputs = [torch.zeros(3, width, dtype=dtype) for _ in range(rows)]
    graph = exported(body, *inputs, *(torch.zeros(shape, dtype=dtype) for shape in shapes))
    output: Any = next(iter(reversed(graph.graph.nodes)))
    output.args = (output.all_input_nodes[0],)
    for node in graph.graph.nodes:  # as passes.experts does: an expert has any number of rows
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
        if node.target is torch.ops.aten.reshape.default and node.args[1][0] == 3:
            node.args = (node.args[0], [-1, *node.args[1][1:]])
    graph.recompile()
    return graph


def body_of(body: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]], width: int, dtype: torch.dtype) -> str:
    """The key of such a graph, registered."""
    return bodies.register(graph_of(body, shapes, width, dtype))


def random(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_within(found: Tensor, expected: Tensor, roundings: float, dtype: torch.dtype | None = None) -> None:
    """Equal but for so many roundings in `dtype` (that of `found` if None), relative to the greatest magnitude.

    Relative to the greatest and not to each value, because a sum's error is that of its largest terms, however small
    the sum comes out.
    """
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    if not found.numel():
        return
    scale = max(1.0, float(expected.double().abs().max()))
    error = float((found.double() - expected.double()).abs().max())
    assert error <= roundings * torch.finfo(dtype or found.dtype).eps * scale, f"{error / scale:.3g}"


BODY_ROUNDINGS = 8
"""An expert's output may differ by so many roundings: the reference rounds after each of its ops (five on the longest
way through a gated body, ten where it is modulated), a kernel once per product, and errors of the first product pass
the second; half an eps each."""
