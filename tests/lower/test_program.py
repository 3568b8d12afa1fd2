"""A graph compiled by Inductor."""

from __future__ import annotations

import torch
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


def test_a_graph_compiled_before_comes_from_inductors_cache():
    x = torch.randn(40)
    with fresh_cache():
        compile_graph(trace_to_graph(function, x), [x])
        counters.clear()
        compile_graph(trace_to_graph(function, x), [x])
        assert counters["inductor"]["fxgraph_cache_hit"] == 1
