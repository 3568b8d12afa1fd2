"""How the lines of code that a tool asks of its user are counted."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def lines_of(functions: Sequence[Callable[..., Any]]) -> int:
    """Lines of code in the bodies of these functions, each counted once.

    Not counted are what a user has without the tool: the function's own head, and statements that return, which stand
    for the user's own call of the model. Blank lines, comments and docstrings are not counted either. Lines are those
    of this repository's format, up to 118 columns.
    """
    return sum(len(set(_lines(_body(function)))) for function in dict.fromkeys(functions))


def _body(function: Callable[..., Any]) -> list[ast.stmt]:
    module = ast.parse(textwrap.dedent(inspect.getsource(function)))
    (found,) = module.body
    assert isinstance(found, ast.FunctionDef)
    documented = ast.get_docstring(found) is not None
    return found.body[documented:]


def _lines(statements: Sequence[ast.stmt]) -> Iterator[int]:
    for statement in statements:
        if isinstance(statement, ast.Return):
            continue
        if isinstance(statement, ast.With):
            yield from range(statement.lineno, statement.body[0].lineno)
            yield from _lines(statement.body)
        else:
            yield from range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
