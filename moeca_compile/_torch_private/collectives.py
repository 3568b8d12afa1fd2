"""Process groups by name, and layers that exchange rows with other ranks run by one process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from moeca_compile._torch_private.lookup import Private

if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh

_LEFT = "layers that exchange rows with other ranks are left as they are"
_GROUP = Private("torch.distributed.distributed_c10d._resolve_process_group", _LEFT)
_WORK = Private("torch._C._distributed_c10d.FakeWork", _LEFT)
_UNBOX = Private("torch._C._distributed_c10d.ProcessGroup.unbox", _LEFT)
_DISPATCH = Private("torch.utils._python_dispatch.TorchDispatchMode", _LEFT)

_PLAYS = (2, 13) <= tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15)
"""On 2.11 a process that played an exchange crashed, and on 2.15 no layer was found."""

PlayedBy = Callable[[Tensor, list[int], list[int], str], Tensor]
"""(what is sent, the sizes of the parts that arrive, those of the parts that are sent, the group's name) -> what
arrives. Without sizes, all parts are equal."""


def ranks_are_joined() -> bool:
    """Whether this process has joined others."""
    return bool(dist.is_available() and dist.is_initialized())


def groups_held(module: nn.Module) -> dict[str, Any]:
    """The process groups, and meshes of them, among the attributes of a module and of those within it."""
    if not ranks_are_joined():
        return {}
    return {
        f"{name}.{attribute}": value
        for name, held in module.named_modules()
        for attribute, value in vars(held).items()
        if isinstance(value, (dist.ProcessGroup, DeviceMesh))
    }


def group_by_name(name: str) -> Any:
    """The process group. Raises RuntimeError where torch cannot find it."""
    if _GROUP.value is None:
        raise RuntimeError("this version of torch finds no process group by its name")
    return _GROUP.value(name)


@contextmanager
def exchanges_played(by: PlayedBy, error: type[Exception]) -> Iterator[None]:
    """While this is entered, all_to_all_single gives what `by` does, and no process talks to another.

    Any other collective raises `error`.
    """
    if not ranks_are_joined() or _DISPATCH.value is None or _WORK.value is None or _UNBOX.value is None:
        yield
        return

    class Mode(_DISPATCH.value):  # type: ignore[name-defined]
        supports_higher_order_operators = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "namespace", "") not in _NAMESPACES or str(func) in _NO_EXCHANGE:
                return func(*args, **(kwargs or {}))
            if not _PLAYS:
                raise error(f"it calls {func}, which cannot be played with torch {torch.__version__}")
            given = _exchange_in(func, args, _UNBOX.value)
            if given is None:
                raise error(f"it calls {func}, and of all collectives only all_to_all_single can be played")
            arrived = by(*given)
            if str(func) not in _IN_PLACE:
                return arrived
            args[0].copy_(arrived.view(args[0].shape))
            return _WORK.value().boxed()

    with Mode():
        yield


def with_exchanges_played(gm: fx.GraphModule, op: Any) -> None:
    """Put `op` (of the arguments of `PlayedBy`) in the place of the exchanges that a graph has recorded."""
    if not ranks_are_joined() or _UNBOX.value is None:
        return
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or getattr(node.target, "namespace", "") not in _NAMESPACES:
            continue
        if str(node.target) in _NO_EXCHANGE:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
            continue
        given = _exchange_in(node.target, node.args, lambda at: _UNBOX.value(getattr(gm, at.target)))
        if given is None:
            raise RuntimeError(f"a graph has the collective {node.target}")
        with gm.graph.inserting_before(node):
            arrived = gm.graph.call_function(op, given)
            if str(node.target) in _IN_PLACE:
                like = gm.graph.call_function(torch.ops.aten.view_as.default, (arrived, node.args[0]))
                gm.graph.call_function(torch.ops.aten.copy_.default, (node.args[0], like))
            else:
                node.replace_all_uses_with(arrived)
        gm.graph.erase_node(node)
    gm.recompile()


_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


# By name: some are defined when the module that has them is first imported.
_IN_PLACE = ("c10d.alltoall_base_.default",)
_FUNCTIONAL = ("_c10d_functional.all_to_all_single.default", "_c10d_functional_autograd.all_to_all_single.default")
_NO_EXCHANGE = ("_c10d_functional.wait_tensor.default", "_c10d_functional._wrap_tensor_autograd.default")


def _exchange_in(op: Any, args: Any, unboxed: Callable[[Any], Any]) -> tuple[Any, list[int], list[int], str] | None:
    """The arguments of `PlayedBy` in a call of an op; None where it is no all_to_all_single."""
    if str(op) in _IN_PLACE:
        _, sent, group, taken_sizes, sent_sizes = args[:5]
        return sent, list(taken_sizes), list(sent_sizes), unboxed(group).group_name
    if str(op) in _FUNCTIONAL:
        sent, taken_sizes, sent_sizes, name = args[:4]
        return sent, list(taken_sizes), list(sent_sizes), name
    return None
