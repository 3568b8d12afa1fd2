"""The code that Inductor writes for a router on CUDA."""

from __future__ import annotations

import re

import torch
from torch import Tensor, fx

from examples.families.dsmoe import DSMoESizes, GroupedSigmoidRouter
from moeca_compile.lower import fuse_routers
from tests.lower.test_fuse_selections import rewritten, traced
from tests.runtime.cuda_code import cuda_code
from tests.runtime.fake_cuda import without_guards


def router(rows: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """DSMoE's, of 16 experts in two groups."""
    own = GroupedSigmoidRouter(DSMoESizes(width=32, depth=1, heads=1, groups=2))
    return list(torch.func.functional_call(own, {"weight": weight, "bias": bias}, (rows,)))


def kernels(gm: fx.GraphModule) -> tuple[int, int, int]:
    """Kernels that Inductor writes for a step, top-k that it leaves to ATen, and routers that are our kernel."""
    mode = gm.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode
    call = cuda_code(gm, mode).split("def call(")[1]
    ours = call.count("torch.ops.moeca.choose_experts.default(")
    return len(re.findall(r"triton_\w+\.run\(", call)), call.count("aten.topk.default("), ours


SHAPES = ((256, 32), (16, 32), (16,))


def test_inductor_makes_three_kernels_of_a_router_of_groups():
    """The best of each group; of those the experts; their weights. It was six, and three topk of ATen of two each."""
    assert kernels(traced(router, *SHAPES)) == (6, 3, 0)
    gm = traced(router, *SHAPES)
    assert rewritten(gm) == 4
    assert kernels(gm) == (3, 0, 0)


def test_a_router_of_groups_is_one_kernel_of_ours_and_nothing_else(monkeypatch):
    monkeypatch.setattr(fuse_routers.kernels, "available", lambda: True)
    gm = traced(router, *SHAPES)
    with without_guards():
        assert fuse_routers.fuse_routers(gm.graph) == 1
    gm.recompile()
    assert rewritten(gm) == 0
    assert kernels(gm) == (0, 0, 1)
