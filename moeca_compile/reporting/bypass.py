"""Methods that run a model past its compiled form, for the report of a model that was compiled and never called."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

PAST = (
    "{0} of {1} runs the model without what torch.compile returned, so a call of it is not compiled and nothing is "
    "cached. Compile that method, too: model.{0} = torch.compile(model.{0}, backend='moeca')"
)


def methods_past_the_compiled(module: nn.Module | None) -> list[str]:
    """A remark for each method of the model's class that calls the model's forward by itself."""
    names = {name for kind in _own_classes(module) for name, value in vars(kind).items() if _calls_forward(value)}
    return [PAST.format(name, type(module).__name__) for name in sorted(names - {"forward", "__call__"})]


def _own_classes(module: nn.Module | None) -> Iterator[type]:
    for kind in type(module).__mro__:
        if kind is nn.Module or kind is object:
            return
        yield kind


def _calls_forward(method: Any) -> bool:
    """Whether a method's source has a call of `self.forward` or of `self`."""
    if not inspect.isfunction(method):
        return False
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):  # no source, or what is none by itself
        return False
    owner = next(iter(inspect.signature(method).parameters), "")
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return any(ast.unparse(called) in (owner, f"{owner}.forward") for called in calls if owner)
