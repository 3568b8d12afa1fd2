"""Backends of the user's that call ours: known only once ours is called, when Dynamo has traced without capture.

Dynamo is then made to trace the same code anew, this time with capture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from moeca_compile._torch_private.frames import calling_code
from moeca_compile._torch_private.lookup import Private
from moeca_compile._torch_private.tracing import traced_code, traces_for_us, tracing_backend

_PARTS = "a backend of the user's that calls ours gets models with MoE layers in parts"
_PASSED_ON = Private("torch._dynamo.exc.TensorifyScalarRestartAnalysis", _PARTS)
_FORGETTING = Private("torch._dynamo.exc.UnspecializeRestartAnalysis", _PARTS)

_callers: Any = WeakIdKeyDictionary()
"""For each backend that called ours, the code of the frames for which it did."""


def calls_ours() -> bool:
    """Whether the backend that Dynamo traces for is known to call ours for the code under trace."""
    known = next((_callers[each] for each in tracing_backend() if each in _callers), None)
    return known is not None and traced_code() in known


def trace_anew_for_ours() -> None:
    """If ours was called by another backend, let Dynamo trace this code once more. Called where ours is."""
    backends, code = list(tracing_backend()), traced_code()
    if not backends or code is None or traces_for_us() or calls_ours() or torch.is_grad_enabled():
        return
    if _PASSED_ON.value is None or _FORGETTING.value is None:
        return
    known = _callers.setdefault(backends[-1], WeakIdKeyDictionary())
    for each in (code, *calling_code()):  # the callers, which Dynamo gave up, are traced anew at the next call
        known[each] = True
    # Dynamo passes on the first from a backend, and at the second forgets what it noted of the last trace.
    raise type("TraceAnew", (_PASSED_ON.value, _FORGETTING.value), {})(restart_reason="traced for moeca_compile")
