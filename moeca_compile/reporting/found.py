"""The record behind what users hold: a compiled model, function or method."""

from __future__ import annotations

from typing import Any

from moeca_compile._torch_private import compiled_call, compiled_module, wrapper_of
from moeca_compile.runtime.record import Record, find_record


def record_of(model: Any) -> Record | None:
    """The record of a compiled model; None before its first call. Raises TypeError for one that is not compiled."""
    wrapper, module = wrapper_of(model), compiled_module(model)
    if wrapper is None and module is model:  # compiled in place: hooks around its forward may hide it from Dynamo
        wrapper = wrapper_of(compiled_call(module))
    if wrapper is None and module is None:
        raise TypeError(
            f"{type(model).__name__} is not compiled: pass what torch.compile(model, backend='moeca') returned"
        )
    return find_record(wrapper, module)
