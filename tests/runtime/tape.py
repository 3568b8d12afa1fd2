"""A stand-in for the device that records CUDA graphs: a tape of the ops that ran, on the tensors they ran on.

As with a CUDA graph, recording changes nothing, a replay runs no Python of the step and looks up no tensor anew, and
what comes out lies where it lay when it was recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}


class Tape(TorchDispatchMode):
    """Ops with their arguments and results, and what the tensors held before that the ops wrote to."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in HOST:
            raise RuntimeError(f"{func} while a graph is recorded")
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            place = tensor.untyped_storage().data_ptr()
            if place not in self.made and id(tensor) not in self.before:
                self.before[id(tensor)] = tensor, tensor.clone()
        result = func(*args, **kwargs)
        self.ops.append((func, args, kwargs, result))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = {t.untyped_storage().data_ptr() for t in tree_leaves(result) if isinstance(t, Tensor)}
        self.made |= made - given
        return result

    def undo(self) -> None:
        for tensor, value in self.before.values():
            tensor.copy_(value)

    def replay(self) -> None:
        for func, args, kwargs, result in self.ops:
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs[argument.name] if argument.name in kwargs else args[place] if place < len(args) else None
            yield from (tensor for tensor in tree_leaves(value) if isinstance(tensor, Tensor))


class TapeRecorder:
    """`runtime.cuda_graphs.Recorder` on a CPU. `events` are what it was asked for."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.outer = False

    def busy(self) -> bool:
        return self.outer

    def ordered_on_stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def rehearse(self, function: Callable[[], Any]) -> Any:
        self.events.append("rehearse")
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        self.events.append("record")
        with torch.no_grad(), Tape() as tape:
            result = function()
        tape.undo()
        return _Replay(tape, self.events), result


class _Replay:
    def __init__(self, tape: Tape, events: list[str]) -> None:
        self.tape, self.events = tape, events

    def replay(self) -> None:
        self.events.append("replay")
        with torch.no_grad():
            self.tape.replay()
