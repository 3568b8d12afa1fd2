"""Products of widened values: what is rewritten, that it means the same, and what is left as it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.lower import multiply_before_widening as pass_
from moeca_compile.passes.analysis.flops import step_flops
from tests.lower import rewrites
from tests.lower.rewrites import traced
from tests.runtime.fake_cuda import CUDA

aten = torch.ops.aten
SHAPES = ((2, 5, 8), (6, 8))
rewritten = partial(rewrites.rewritten, pass_.multiply_before_widening)


def wide(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`x.to(dtype)`, as it stands in an exported graph."""
    return aten._to_copy(x, dtype=dtype)


def router(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(wide(x), wide(weight)).sigmoid()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_neither_rows_nor_weights_are_widened(dtype):
    gm = traced(router, *SHAPES, dtype=dtype)
    flops = step_flops(gm.graph)
    assert rewritten(gm) == 1
    targets = {node.target for node in gm.graph.nodes}
    assert aten.mm.dtype in targets and not targets & {aten.linear.default, aten._to_copy.default}
    (sigmoid,) = gm.graph.find_nodes(op="call_function", target=aten.sigmoid.default)
    value = sigmoid.args[0].meta["val"]
    assert (tuple(value.shape), value.dtype, value.device) == ((2, 5, 6), torch.float32, CUDA)
    assert step_flops(gm.graph) == flops


class OnTheHost(fx.Interpreter):
    """Runs mm.dtype by its meaning; ATen has it for accelerators alone."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not aten.mm.dtype:
            return super().call_function(target, args, kwargs)
        left, right, dtype = args
        assert left.dtype == right.dtype == torch.bfloat16
        return (left.double() @ right.double()).to(dtype)


def test_the_same_values(monkeypatch):
    monkeypatch.setattr(pass_, "_on_cuda", lambda node: True)
    gm = traced(router, *SHAPES, dtype=torch.bfloat16)
    assert rewritten(gm) == 1
    x, weight = (torch.randn(shape).bfloat16() for shape in SHAPES)
    torch.testing.assert_close(OnTheHost(gm).run(x, weight), router(x, weight), rtol=1e-6, atol=1e-6)


def test_rows_that_others_read_in_float32_stay_so():
    gm = traced(lambda x, w: (F.linear(wide(x), wide(w)), wide(x).exp()), *SHAPES, dtype=torch.bfloat16)
    assert rewritten(gm) == 1
    assert len(gm.graph.find_nodes(op="call_function", target=aten._to_copy.default)) == 1


NEAR_MISSES = {
    "a bias": lambda x, w: F.linear(wide(x), wide(w), wide(w)[:, 0]),
    "one of the two": lambda x, w: F.linear(wide(x), wide(w) * 1),
    "two dtypes": lambda x, w: F.linear(wide(x), wide(wide(w, torch.float16))),
    "wider": lambda x, w: F.linear(wide(x, torch.float64), wide(w, torch.float64)),
    "not widened": lambda x, w: F.linear(x, w),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_stays_as_it_is(name):
    gm = traced(NEAR_MISSES[name], *SHAPES, dtype=torch.bfloat16)
    before = [node.target for node in gm.graph.nodes]
    assert rewritten(gm) == 0
    assert [node.target for node in gm.graph.nodes] == before


def test_nothing_is_rewritten_for_a_cpu():
    assert rewritten(traced(router, *SHAPES, device=torch.device("cpu"), dtype=torch.bfloat16)) == 0
