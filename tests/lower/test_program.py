"""A graph compiled by Inductor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from moeca_compile._torch_private import compile_graph, trace_to_graph
from moeca_compile.lower import parts, program
from moeca_compile.lower.program import trace_step
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.step_function import StepResult
from tests.harness import lower_alone


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


def test_the_sources_of_our_ops_are_part_of_inductors_keys(monkeypatch):
    """Its keys have the names of ops alone, and code that was compiled for an op as it was must not be used."""
    tags = []

    def compiled(gm, *_):
        tags.append(torch.compiler.config.cache_key_tag)
        return gm

    def step(inputs, *_):
        return StepResult((inputs[0].sin(),), {}, None)

    monkeypatch.setattr(parts, "compile_graph", compiled)
    x = torch.ones(2)
    with torch.compiler.config.patch(cache_key_tag="user's"):
        for digest in ("one", "one", "other"):
            monkeypatch.setattr(program, "source_digest", lambda folder, digest=digest: f"{folder} {digest}")
            lower_alone(trace_step(step, [x], Caches((), x.device), x), "inductor", whole=True)
        assert torch.compiler.config.cache_key_tag == "user's"
    assert tags[0] == tags[1] != tags[2] and all("user's" in tag for tag in tags)
