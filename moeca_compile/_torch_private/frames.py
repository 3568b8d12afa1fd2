"""The Python functions that run around the one that Dynamo is compiling, and how Dynamo looks at them again.

Dynamo gives a function up for good where a loop in it breaks the graph, whatever backend it was compiled for. Its
callees are then compiled one by one, and the backend is to know that these are parts of a model.
"""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from moeca_compile._torch_private.lookup import Private
from moeca_compile._torch_private.tracing import first_argument, root_module

_DYNAMO = os.path.join(os.path.dirname(torch.__file__), "_dynamo", "convert_frame.py")
_LIBRARIES = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))

_CONTEXT = Private(
    "torch._dynamo.eval_frame._TorchDynamoContext",
    "reports count the parts of a model that Dynamo gave up before as whole graphs, and such a model stays in parts",
)
_RESET_CODE = Private(
    "torch._C._dynamo.eval_frame.reset_code",
    "a model that Dynamo gave up before, for another backend or mode, stays in parts",
)


def _place(code: CodeType) -> tuple[str, int]:
    """Where code is written. Torch 2.15 makes a copy of it, with another name, for each function that it wraps."""
    return code.co_filename, code.co_firstlineno


def _places_within(function: object) -> set[tuple[str, int]]:
    """Where the functions are written that are defined in a function."""
    constants = function.__code__.co_consts  # type: ignore[attr-defined]
    return {_place(constant) for constant in constants if isinstance(constant, CodeType)}


def _calling_frames() -> list[FrameType]:
    """The frames between the one that Dynamo is compiling and torch.compile's wrapper, which is told by its code."""
    wrappers = _places_within(_CONTEXT.value.__call__) if _CONTEXT.value is not None else set()
    found: list[FrameType] = []
    frame = sys._getframe().f_back
    while frame is not None and _place(frame.f_code) not in wrappers:
        found.append(frame)
        if frame.f_code.co_filename == _DYNAMO:
            found.clear()  # up to here it is Dynamo and the backend that it called, which may be the user's
        frame = frame.f_back
    return found if frame is not None else []


def _users(frames: list[FrameType]) -> list[FrameType]:
    return [frame for frame in frames if not frame.f_code.co_filename.startswith(_LIBRARIES)]


class Compilation(NamedTuple):
    """A frame that Dynamo is about to trace.

    values: of its variables and of the variables around it, and of the globals that it names
    codes: its code, and that of all functions that are running. Code that Dynamo has written may have no hash
    backend: what Dynamo will call with the graph; None where that is not found
    """

    values: tuple[Any, ...]
    codes: tuple[CodeType, ...]
    backend: Any


def compilation_at_start() -> Compilation | None:
    """The compilation that has just begun in this thread, for a callback at its start; None where it is not found.

    Read from the variables of Dynamo's own function, which has had these names since torch 2.0.
    """
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    for each in frames:
        if each.f_code.co_filename == _DYNAMO and {"code", "locals", "globals"} <= each.f_locals.keys():
            code, names = each.f_locals["code"], each.f_locals["globals"]
            around = [_content(cell) for cell in each.f_locals.get("closure") or ()]
            values = [*each.f_locals["locals"].values(), *around, *(names.get(name) for name in code.co_names)]
            codes = (code, *(running.f_code for running in frames))
            return Compilation(tuple(values), codes, _backend_within(frames))
    return None


def _backend_within(frames: list[FrameType]) -> Any:
    names = (each.f_locals for each in frames if each.f_code.co_filename == _DYNAMO)
    return next((each["compiler_fn"] for each in names if "compiler_fn" in each), None)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def in_decorated_function() -> bool:
    """Whether one of the callers is decorated with a context of torch's, such as no_grad."""
    decorated = _place(torch.no_grad()(in_decorated_function).__code__)
    return any(_place(frame.f_code) == decorated for frame in _calling_frames())


def calling_code() -> list[CodeType]:
    """Code of the functions that run as plain Python around the frame that Dynamo is compiling."""
    return [frame.f_code for frame in _users(_calling_frames())]


def outermost_module() -> nn.Module | None:
    """The module that was called as a whole: the first argument of the outermost of those, else `root_module`."""
    for frame in reversed(_users(_calling_frames())):
        value = first_argument(frame.f_code, frame.f_locals)
        if isinstance(value, nn.Module):
            return value
    return root_module()


def dynamo_is_running() -> bool:
    """Whether any thread is in a compiled function or compiles one. Code must not be forgotten then."""
    folder = os.path.join(os.path.dirname(torch.__file__), "_dynamo", "")
    for frame in sys._current_frames().values():
        each: FrameType | None = frame
        while each is not None:
            if each.f_code.co_filename.startswith(folder):
                return True
            each = each.f_back
    return False


def forget_code(code: CodeType) -> None:
    """Let Dynamo forget what it compiled for `code`, and that it had given it up."""
    if _RESET_CODE.value is not None:
        _RESET_CODE.value(code)
