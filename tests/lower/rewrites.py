"""What tests of the rewrites of traced steps share: a graph as for CUDA, and a rewrite of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from moeca_compile._torch_private import trace_to_graph
from tests.runtime.fake_cuda import CUDA, without_guards


def traced(
    function: Callable[..., Any], *shapes: Any, device: torch.device = CUDA, dtype: torch.dtype = torch.float32
) -> fx.GraphModule:
    with FakeTensorMode(allow_non_fake_inputs=True), without_guards():
        return trace_to_graph(function, *(torch.empty(shape, device=device, dtype=dtype) for shape in shapes))


def rewritten(rewrite: Callable[[fx.Graph], int], gm: fx.GraphModule) -> int:
    """Rewrite in place; returns what the rewrite returns."""
    with without_guards():
        count = rewrite(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return count
