"""Graphs that Dynamo calls for the very modules that it traced, and for no others that are like them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from moeca_compile._torch_private.lookup import Private
from moeca_compile._torch_private.tracing import traced_scope

_LOST = "weights that move are compiled anew, and the ninth model of a class runs in eager mode"
_INSTALL_GUARD = Private("torch._dynamo.guards.install_guard", _LOST)
_ID_MATCH = Private("torch._dynamo.guards.GuardBuilder.ID_MATCH", _LOST)


def own_modules(placeholders: Iterable[fx.Node]) -> tuple[nn.Module, ...] | None:
    """The outermost modules that the weights among these inputs of Dynamo's graph are read from.

    Guards on them are added, so that Dynamo calls the graph for these modules alone. It then counts compilations for
    each model by itself, not for all models of a class together. None where that is not possible: one module may then
    take the place of another.
    """
    if _INSTALL_GUARD.value is None or _ID_MATCH.value is None:
        return None
    try:
        roots = {root.name: root for root in map(_outermost, placeholders) if root is not None}
        modules = [eval(name, traced_scope()) for name in roots]
        if not modules or not all(isinstance(module, nn.Module) for module in modules):
            return None
        for root in roots.values():
            _INSTALL_GUARD.value(root.make_guard(_ID_MATCH.value))
    except Exception:  # torch has these names, but they are no longer what they were
        return None
    return tuple(modules)


def _outermost(placeholder: fx.Node) -> Any:
    """The source of the outermost module that an input is read from; None for an argument of the model."""
    source, found = getattr(placeholder, "_dynamo_source", None), None
    while source is not None:
        kind = type(source).__name__
        if "NNModule" in kind or ("ParamBuffer" in kind and found is None):
            found = source.base
        source = getattr(source, "base", None)
    return found
