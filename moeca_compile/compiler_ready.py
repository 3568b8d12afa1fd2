"""The C++ compiler is made ready from the moment Dynamo begins to trace a model for this backend.

Tracing, export and validation keep one core busy, and what the compiler can is found out by its own processes: so on
two cores Inductor hardly waits for it.
"""

from __future__ import annotations

import logging
from typing import Any

from moeca_compile._torch_private import (
    compilation_at_start,
    make_cpp_compiler_ready,
    on_every_compile_start,
    options_for_ours,
)
from moeca_compile.capture.running.layers import modules_among

_log = logging.getLogger(__name__)


def install() -> None:
    """Make the compiler ready at the start of each compilation that will need it, once a process."""
    on_every_compile_start(_begin)


def _begin(*_: Any) -> None:
    try:
        if _will_compile_cpp():
            make_cpp_compiler_ready()
    except Exception:  # this is called in each compilation of the process, for whatever backend
        _log.debug("the C++ compiler is made ready later", exc_info=True)


def _will_compile_cpp() -> bool:
    """Whether a model on a CPU is about to be compiled for this backend by Inductor."""
    started = compilation_at_start()
    options = options_for_ours(started.backend) if started is not None else None
    if started is None or options is None or options.get("lowering") == "eager":
        return False
    weights = (weight for module in modules_among(started.values) for weight in module.parameters())
    first = next(weights, None)
    return first is not None and first.device.type == "cpu"
