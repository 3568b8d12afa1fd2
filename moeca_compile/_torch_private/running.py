"""Graphs of functions that Dynamo cannot trace: by running them on real tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, fx

from moeca_compile._torch_private.collectives import with_exchanges_played
from moeca_compile._torch_private.lookup import Private

_SKIPPED = "MoE layers whose code no idiom can read are left as they are"
_MAKE_FX = Private("torch.fx.experimental.proxy_tensor.make_fx", _SKIPPED)
_FUNCTIONALIZE = Private("torch._subclasses.functional_tensor.dispatch_functionalize", _SKIPPED)
_DISPATCH = Private("torch.utils._python_dispatch.TorchDispatchMode", _SKIPPED)
_MODE = Private("torch._subclasses.functional_tensor.FunctionalTensorMode", _SKIPPED)


def trace_by_running(
    function: Callable[..., Any], inputs: Sequence[Tensor], exchange: Any = None
) -> fx.GraphModule | None:
    """What `function(*inputs)` did, as functional ATen; None where torch lacks what it takes.

    Pre-dispatch, so that `linear`, `softmax` and `topk` stay whole. What the host read of the tensors is a constant
    of the graph. The function itself is run first; taking in-place ops out of it needs a graph already, since their
    wrapped tensors have no values for a host to read. What it exchanged with other ranks becomes calls of `exchange`
    (collectives.PlayedBy).
    """
    if _MAKE_FX.value is None or _FUNCTIONALIZE.value is None or _MODE.value is None:
        return None
    how = {"tracing_mode": "real", "pre_dispatch": True, "_error_on_data_dependent_ops": False}
    ran = _MAKE_FX.value(function, **how)(*inputs)
    with_exchanges_played(ran, exchange)
    functional = _FUNCTIONALIZE.value(ran, _MODE.value(pre_dispatch=True, export=True))
    found: fx.GraphModule = _MAKE_FX.value(functional, **how)(*inputs)
    return found


def before_each_op(what: Callable[[Any, tuple[Any, ...]], None]) -> AbstractContextManager[Any]:
    """While this is entered, `what(op, arguments)` is called for each op that runs."""
    if _DISPATCH.value is None:
        raise RuntimeError("torch has no dispatch mode")

    class Mode(_DISPATCH.value):  # type: ignore[name-defined]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            what(func, args)
            return func(*args, **(kwargs or {}))

    found: AbstractContextManager[Any] = Mode()
    return found
