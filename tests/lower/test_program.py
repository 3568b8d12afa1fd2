"""A graph compiled by Inductor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from moeca_compile._torch_private import compile_graph, trace_to_graph


def function(x: torch.Tensor) -> list[torch.Tensor]:
    return [(x + 1.0).sin()]


def test_a_compiled_graph_gives_what_the_function_gives():
    x = torch.randn(40)
    with fresh_cache(), torch.no_grad():
        compiled = compile_graph(trace_to_graph(function, x), [x])
        torch.testing.assert_close(compiled(x)[0], function(x)[0])


def test_random_numbers_are_those_of_eager_mode():
    def drops(x: torch.Tensor) -> list[torch.Tensor]:
        return [F.dropout(x, 0.5, training=True) + torch.randn(40)]

    x = torch.randn(40)
    with fresh_cache(), torch.no_grad():
        compiled = compile_graph(trace_to_graph(drops, x), [x], eager_random=True)
        found, wanted = (from_seed(run, x) for run in (compiled, drops))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def from_seed(run: Callable[..., list[torch.Tensor]], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What it returns, and the state of the generator afterwards."""
    torch.manual_seed(3)
    return run(x)[0], torch.get_rng_state()


def test_a_graph_compiled_before_comes_from_inductors_cache():
    x = torch.randn(40)
    with fresh_cache():
        compile_graph(trace_to_graph(function, x), [x])
        counters.clear()
        compile_graph(trace_to_graph(function, x), [x])
        assert counters["inductor"]["fxgraph_cache_hit"] == 1
