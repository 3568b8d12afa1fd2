"""Calls of a logger that logs nothing at this level: `logger.debug("shape %s", x.shape)`.

Dynamo breaks the graph at any call of a logger. One that is switched off when the graph is traced does nothing.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from moeca_compile._torch_private.lookup import Private
from moeca_compile._torch_private.tracing import traces_for_us

_LOGGER = Private(
    "torch._dynamo.variables.misc.LoggingLoggerVariable", "the graph breaks at calls of a logger that logs nothing"
)
_CONSTANT = Private(
    "torch._dynamo.variables.ConstantVariable", "the graph breaks at calls of a logger that logs nothing"
)
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "exception": logging.ERROR,
    "critical": logging.CRITICAL,
}


def pass_idle_logging() -> None:
    """Have Dynamo, where it traces for a backend of ours, go on at such calls."""
    if _LOGGER.value is None or _CONSTANT.value is None or hasattr(_LOGGER.value.call_method, "_moeca_original"):
        return
    original = _LOGGER.value.call_method

    @functools.wraps(original)
    def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        level = _LEVELS.get(name)
        if level is not None and traces_for_us() and not self.value.isEnabledFor(level):
            return _CONSTANT.value.create(None)
        return original(self, tx, name, args, kwargs)

    call_method._moeca_original = original  # type: ignore[attr-defined]
    _LOGGER.value.call_method = call_method
