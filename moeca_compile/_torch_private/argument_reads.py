"""Numbers that the host reads of one argument of the model, such as the lengths of texts: known by its value.

Dynamo breaks the graph where Python reads a tensor. Where what it reads is made of one integer argument and of
constants, the graph that is traced holds for calls in which it is the same, which a guard says. A model gets so many
graphs for such values and no more, and fewer for one that changes from call to call, as a timestep does; then the
graph breaks, as it would have at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from math import isfinite
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, fx

from moeca_compile._torch_private.frames import calling_code
from moeca_compile._torch_private.graphs import is_module_state
from moeca_compile._torch_private.lookup import Private
from moeca_compile._torch_private.modules import version_of
from moeca_compile._torch_private.tracing import traced_code, traced_wrapper

_log = logging.getLogger(__name__)
_BREAKS = "the graph breaks where the host reads an argument"
_INSTALL_GUARD = Private("torch._dynamo.guards.install_guard", _BREAKS)
_ROOT_GUARDS = Private("torch._C._dynamo.guards.RootGuardManager", _BREAKS)

_DYNAMO = os.path.join(os.path.dirname(torch.__file__), "_dynamo")
_TRYING_GUARDS = tuple(os.path.join(_DYNAMO, name) for name in ("guards.py", "convert_frame.py"))
"""What calls new guards to see that they work."""

_MOST, _AT_ONCE = 4, 2
"""For how many values of arguments one compiled model is traced anew: in all, and before each has come again (two
kinds of calls may take turns)."""
_values: dict[int, dict[Any, int]] = {}
"""By the identity of a compiled model: how often calls had what was read of each of these values."""


def is_argument(node: fx.Node) -> bool:
    """Whether a node of Dynamo's graph is an argument of the model that holds integers or truths."""
    example = node.meta.get("example_value")
    plain = isinstance(example, Tensor) and not example.is_floating_point() and not example.is_complex()
    return node.op == "placeholder" and plain and "grapharg" in node.meta and not is_module_state(node)


def value_of(argument: fx.Node, node: fx.Node, computed: Callable[[Any], Any]) -> Any:
    """What a node that is made of an argument holds in this call, as Python's numbers; None where it stays unknown.

    computed: the node's value for a value of the argument. A guard has it called again in later calls.
    """
    given = argument.meta["grapharg"]
    if not _can_guard() or calling_code():  # the arguments of a part of a model are made in another part
        return None
    value, seen = _plain(computed(given.example)), _values_seen()
    key = (str(given.source), tuple(given.example.shape), str(given.example.tolist()))
    often = len(seen) < _AT_ONCE or all(count > 1 for count in seen.values())
    if value is None or (key not in seen and not (often and len(seen) < _MOST)):
        return None
    seen.setdefault(key, 0)
    _INSTALL_GUARD.value(given.source.make_guard(_guard(computed, value, str(node), seen, key)))
    return value


def _plain(value: Tensor) -> Any:
    found = value.tolist()
    finite = isfinite(found) if not isinstance(found, list) else bool(value.isfinite().all())
    return found if finite else None


def _values_seen() -> dict[Any, int]:
    compiled = traced_wrapper() or traced_code()
    if id(compiled) not in _values:
        _values[id(compiled)] = {}
        finalize(compiled, _values.pop, id(compiled), None)
    return _values[id(compiled)]


def _guard(
    computed: Callable[[Any], Any], value: Any, name: str, seen: dict[Any, int], key: Any
) -> Callable[[Any, Any], None]:
    last: list[Any] = [ref(computed), None]  # the tensor that held last, and its version

    def is_same(tensor: Any) -> bool:
        if not tensor.is_inference() and last[0]() is tensor and last[1] == version_of(tensor):
            return True
        same = bool(_plain(computed(tensor)) == value)
        last[:] = [ref(tensor), version_of(tensor)] if same else [ref(computed), None]
        return same

    def holds(tensor: Any) -> bool:
        try:
            same = is_same(tensor)
        except Exception:  # another kind of argument
            return False
        if sys._getframe(1).f_code.co_filename not in _TRYING_GUARDS:
            seen[key] += same
        return same

    def of_value(builder: Any, guard: Any) -> None:
        text = f"what the host reads of {guard.name} ({name}) is {value}"
        builder.get_guard_manager(guard).add_lambda_guard(holds, [text], None)

    return of_value


def _can_guard() -> bool:
    """Whether this version of torch takes such a guard."""
    try:
        _ROOT_GUARDS.value().add_lambda_guard(lambda _: True, ["nothing"], None)
        return _INSTALL_GUARD.value is not None
    except Exception:
        _log.debug("torch takes no guard by a function, so the host's reads of arguments break the graph")
        return False
