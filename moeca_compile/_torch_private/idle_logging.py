"""Calls of a logger that logs nothing at this level: `logger.debug("shape %s", x.shape)`.

Dynamo breaks the graph at any call of a logger. One that is switched off when the graph is traced does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from moeca_compile._torch_private.lookup import Private
from moeca_compile._torch_private.method_calls import ask_first
from moeca_compile._torch_private.tracing import traces_for_us

_BREAKS = "the graph breaks at calls of a logger that logs nothing"
_LOGGER = Private("torch._dynamo.variables.misc.LoggingLoggerVariable", _BREAKS)
_CONSTANT = Private("torch._dynamo.variables.ConstantVariable", _BREAKS)
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
    if _LOGGER.value is not None and _CONSTANT.value is not None:
        ask_first(_LOGGER.value, _answer)


def _answer(original: Callable[..., Any], variable: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    level = _LEVELS.get(name)
    if level is not None and traces_for_us() and not variable.value.isEnabledFor(level):
        return _CONSTANT.value.create(None)
    return original(variable, tx, name, args, kwargs)
