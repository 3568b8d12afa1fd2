"""Inductor's code for CUDA on a machine without it: the code is generated, and neither compiled nor run.

What asks the device something is told that it is an H100. Inductor's pattern matcher is off, since it traces its
patterns on real tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import fx
from torch._dynamo.device_interface import CudaInterface
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, tracing
from torch._inductor import config, scheduler
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import InductorError
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moeca_compile.lower.partition import whole_graph
from tests.runtime.fake_cuda import CUDA, without_guards

H100 = {
    "type": "cuda",
    "index": 0,
    "multi_processor_count": 132,
    "major": 9,
    "minor": 0,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "L2_cache_size": 50 << 20,
    "total_memory": 80 << 30,
    "name": "H100",
    "gcnArchName": "",
}


class _GeneratedError(Exception):
    """Raised where the code would be compiled, to end there."""


def cuda_code(gm: fx.GraphModule, mode: FakeTensorMode) -> str:
    """The Python code, with Triton kernels in it, that Inductor makes of a step traced on fake CUDA tensors."""
    (call,) = whole_graph(gm)
    found: list[str] = []
    # Inductor wants symbols for shapes, though all of these are static.
    mode.shape_env, mode.static_shapes = ShapeEnv(), True
    with without_guards(), _pretended(found), torch.no_grad(), tracing(TracingContext(mode)):
        with mode:
            layouts = call.subgraph.examples()
            examples = [torch.empty_strided(e.size(), e.stride(), dtype=e.dtype, device=e.device) for e in layouts]
        with pytest.raises(InductorError, match="_GeneratedError"):
            compile_fx(call.subgraph.module(), examples)
    (code,) = found
    return code


@contextmanager
def _pretended(found: list[str]) -> Iterator[None]:
    def stop(lowering: GraphLowering) -> None:
        code, _ = lowering.codegen()
        found.append(code.value)
        raise _GeneratedError

    def properties(*_: object) -> SimpleNamespace:
        return SimpleNamespace(**H100)

    def copy(into: torch.Tensor, value: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return torch.ops.aten.copy_(into, value, non_blocking)

    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: CUDA,
    )
    cuda = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "synchronize": lambda *_: None,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": properties,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "_lazy_init": lambda *_: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
    }
    interface = {
        "is_available": lambda: True,
        "get_compute_capability": lambda *_: 90,
        "get_device_properties": properties,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", target, raising=False)
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        for name, value in interface.items():
            patch.setattr(CudaInterface, name, staticmethod(value))
        patch.setattr(CudaInterface.Worker, "get_device_properties", staticmethod(properties))
        patch.setattr(CudaInterface.Worker, "current_device", staticmethod(lambda: 0))
        patch.setattr(torch.version, "cuda", "13.0")
        for module in (scheduler, _triton):
            patch.setattr(module, "has_triton", lambda *_: True)
        for module in (joint_graph, post_grad):
            patch.setattr(module, "lazy_init", lambda *_: None)
        for kind in (FakeTensor, FunctionalTensor):
            patch.setattr(kind, "copy_", copy, raising=False)
        patch.setattr(AsyncCompile, "triton", lambda *_, **__: None)  # would compile ahead
        patch.setattr(GraphLowering, "compile_to_module", stop)
        off = {"pattern_matcher": False, "joint_graph_constant_folding": False, "fx_graph_cache": False}
        with config.patch(**off), functorch_config.patch(enable_autograd_cache=False):
            yield
