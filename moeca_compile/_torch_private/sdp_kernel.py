"""`torch.backends.cuda.sdp_kernel(...)` is traced as `torch.nn.attention.sdpa_kernel(...)`, which it calls itself.

Dynamo takes the older one for an op, and breaks the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from moeca_compile._torch_private.lookup import Private
from moeca_compile._torch_private.tracing import traces_for_us

_BREAKS = "the graph breaks at torch.backends.cuda.sdp_kernel"
_HANDLERS = Private("torch._dynamo.variables.torch.TorchInGraphFunctionVariable._get_handlers", _BREAKS)
_FUNCTION = Private("torch._dynamo.variables.functions.UserFunctionVariable", _BREAKS)


def _newer(
    enable_flash: bool = True, enable_math: bool = True, enable_mem_efficient: bool = True, enable_cudnn: bool = True
) -> Any:
    backends = []
    if enable_flash:
        backends.append(SDPBackend.FLASH_ATTENTION)
    if enable_mem_efficient:
        backends.append(SDPBackend.EFFICIENT_ATTENTION)
    if enable_math:
        backends.append(SDPBackend.MATH)
    if enable_cudnn:
        backends.append(SDPBackend.CUDNN_ATTENTION)
    return sdpa_kernel(backends)


def trace_sdp_kernel() -> None:
    """Have Dynamo, where it traces for a backend of ours, take the one for the other."""
    older = getattr(torch.backends.cuda, "sdp_kernel", None)
    if older is None or _HANDLERS.value is None or _FUNCTION.value is None:
        return

    def handler(_: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        return _FUNCTION.value(_newer).call_function(tx, list(args), kwargs) if traces_for_us() else None

    _HANDLERS.value().setdefault(older, handler)
