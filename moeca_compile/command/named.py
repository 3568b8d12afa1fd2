"""The user's functions, named on the command line as `module:function`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

_NOT_THE_USERS = (Path(torch.__file__).parent, Path(__file__).parent)


class CommandError(Exception):
    """What the user can put right. Its message says how."""


def function_named(name: str) -> Callable[..., Any]:
    """The callable at `module:function`, or at `module:Class.method`. Modules of the current folder are found.

    Raises CommandError for a name of another form, and where nothing callable is there.
    """
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise CommandError(f"{name!r} is no module:function. Write it as you would import it, such as my_model:make")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = _module(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            known = [each for each in vars(found) if callable(vars(found)[each]) and not each.startswith("_")]
            raise CommandError(f"{module_name} has no {path}. It has {', '.join(known) or 'no functions'}")
        found = getattr(found, part)
    if not callable(found):
        raise CommandError(f"{name} is a {type(found).__name__}. Name a function that makes it")
    return found


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise CommandError(
                f"there is no module {error.name!r}. Run moeca in the folder that it is in, and name it without .py"
            ) from error
        raise CommandError(f"importing {name} {raised(error)}") from error
    except Exception as error:
        raise CommandError(f"importing {name} {raised(error)}") from error


def called(name: str, *arguments: Any) -> Any:
    """What the function of this name returns. Raises CommandError with the line where it raised, if it did."""
    function = function_named(name)
    try:
        return function(*arguments)
    except Exception as error:
        raise CommandError(f"{name} {raised(error)}") from error


def raised(error: BaseException) -> str:
    """The end of a sentence: what was raised, and in which line of code that is neither torch's nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(map(Path(frame.filename).is_relative_to, _NOT_THE_USERS))]
    where = f" in {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"raised {type(error).__name__}{where}: {error}"
