"""Callbacks before each compilation of this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeca_compile._torch_private.lookup import Private

CompileStart = Callable[..., None]

_HANDLER = Private(
    "torch._dynamo.callback.callback_handler",
    "classes are looked at once, when the backend is loaded: the MoE layers of later ones break the graph",
)
_lasting: list[CompileStart] = []


class _LastingCallbacks(list[CompileStart]):
    """Dynamo's list, in which ours outlast `torch._dynamo.reset()`: they are no compiled state to be cleared."""

    def clear(self) -> None:
        self[:] = [callback for callback in self if callback in _lasting]


def on_every_compile_start(callback: CompileStart) -> None:
    """Call `callback` before each compilation in this process, until `not_on_compile_start(callback)`."""
    handler: Any = _HANDLER.value
    if not isinstance(getattr(handler, "start_callbacks", None), list):
        callback()
        return
    if not isinstance(handler.start_callbacks, _LastingCallbacks):
        handler.start_callbacks = _LastingCallbacks(handler.start_callbacks)
    if callback not in handler.start_callbacks:
        _lasting.append(callback)
        handler.start_callbacks.append(callback)


def not_on_compile_start(callback: CompileStart) -> None:
    """Undo `on_every_compile_start`."""
    for callbacks in (_lasting, getattr(_HANDLER.value, "start_callbacks", [])):
        if callback in callbacks:
            callbacks.remove(callback)
