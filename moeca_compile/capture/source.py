"""The code of a method, as the recognizers read it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any


@dataclass(frozen=True)
class Method:
    """A method's code: its qualified name, `where` ("file:line"), its syntax tree, the undecorated function."""

    name: str
    where: str
    tree: ast.FunctionDef
    function: FunctionType


def innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that someone wrote, under decorators such as `torch.no_grad`, which hide its code."""
    return inspect.unwrap(function)


def read_method(function: Callable[..., Any]) -> Method | None:
    """The code of `function`; None where Python cannot show it (built in, made by exec, source file gone)."""
    written = innermost(function)
    try:
        source = textwrap.dedent(inspect.getsource(written))
        tree = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, ast.FunctionDef) or not isinstance(written, FunctionType):
        return None
    code = written.__code__
    return Method(written.__qualname__, f"{code.co_filename}:{code.co_firstlineno}", tree, written)


def functions_of(owner: type) -> Iterator[FunctionType]:
    """The functions of a class and of those that it inherits from, torch's own excepted, as someone wrote them."""
    for each in owner.__mro__:
        if not is_torchs(each) and each is not object:
            written = map(innermost, namespace_of(each).values())
            yield from (value for value in written if isinstance(value, FunctionType))


def codes_of(owner: type, but: Callable[[type], bool]) -> Iterator[tuple[str, CodeType]]:
    """(name, code) of the methods and properties of a class and of those that it inherits from, but for some."""
    for each in owner.__mro__:
        for name, value in namespace_of(each).items() if not but(each) else ():
            written = innermost(getattr(value, "fget", None) or value)
            if isinstance(written, FunctionType):
                yield name, written.__code__


def is_torchs(owner: type) -> bool:
    return str(namespace_of(owner).get("__module__", "")).startswith("torch.")


def namespace_of(owner: type) -> Mapping[str, Any]:
    """What a class's body defined, whatever its metaclass answers."""
    namespace: Mapping[str, Any] = type.__dict__["__dict__"].__get__(owner)
    return namespace
