"""The code that Inductor writes for a router on CUDA."""

from __future__ import annotations

import re

import torch
from torch import Tensor, fx

from examples.families.dsmoe import DSMoESizes, GroupedSigmoidRouter
from tests.lower.test_fuse_selections import rewritten, traced
from tests.runtime.cuda_code import cuda_code


def router(rows: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """DSMoE's, of 16 experts in two groups."""
    own = GroupedSigmoidRouter(DSMoESizes(width=32, depth=1, heads=1, groups=2))
    return list(torch.func.functional_call(own, {"weight": weight, "bias": bias}, (rows,)))


def kernels(gm: fx.GraphModule) -> tuple[int, int]:
    """Kernels that Inductor writes for a step, and top-k that it leaves to ATen."""
    mode = gm.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode
    call = cuda_code(gm, mode).split("def call(")[1]
    return len(re.findall(r"triton_\w+\.run\(", call)), call.count("aten.topk.default(")


def test_inductor_makes_three_kernels_of_a_router_of_groups():
    """The best of each group; of those the experts; their weights. It was six, and three topk of ATen of two each."""
    shapes = ((256, 32), (16, 32), (16,))
    assert kernels(traced(router, *shapes)) == (6, 3)
    gm = traced(router, *shapes)
    assert rewritten(gm) == 4
    assert kernels(gm) == (3, 0)
