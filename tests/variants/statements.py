"""Statements that people write beside a dispatch, put into the code of a layer: none touches its result.

They go where the dispatch itself stands, so that whatever reads or runs the layer meets them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import linecache
import logging
import textwrap
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

Kind = TypeVar("Kind", bound=type[nn.Module])


class Statement(NamedTuple):
    """Code before a dispatch, in each turn of its loop, and after it; {x} is the layer's first argument."""

    before: str = ""
    inside: str = ""
    after: str = ""


STATEMENTS: dict[str, Statement] = {
    "assert": Statement("assert {x}.shape[-1] == {x}.size(-1), 'width'"),
    "attribute": Statement(after="self.kept_rows = {x}.detach()"),
    "counter": Statement(after="self.calls = getattr(self, 'calls', 0) + 1"),
    "deleted": Statement("spare = {x} + 1\ndel spare"),
    "effect": Statement("self.note({x})"),
    "finite": Statement("if not {x}.isfinite().all():\n    raise ValueError('not finite')"),
    "import": Statement("import math\nmath.sqrt(4.0)"),
    "list": Statement("noted = []", "noted.append(1)", "self.noted = len(noted)"),
    "logging": Statement("log.debug('rows of %s', {x}.shape)"),
    "nested": Statement("def same(a):\n    return a * 1.0\n{x} = same({x})"),
    "no autocast": Statement("with torch.autocast('cpu', enabled=False):\n    {x} = {x} * 1.0"),
    "off": Statement(after="if getattr(self, 'record', False):\n    self.recorded = {x}"),
    "raise": Statement("if {x}.dim() not in (2, 3):\n    raise ValueError('rank')"),
    "try": Statement("try:\n    {x} = {x} * 1.0\nexcept RuntimeError:\n    raise"),
    "widest": Statement(after="self.widest = {x}.abs().max().item()"),
}
_numbers = itertools.count()


@functools.cache
def with_statements(kind: Kind, names: tuple[str, ...]) -> Kind:
    """The class with these statements in its forward, which inspect finds the source of."""
    if not names:
        return kind
    written = inspect.unwrap(kind.forward)
    tree = ast.parse(textwrap.dedent(inspect.getsource(written)))
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    for name in names:
        _put(function, STATEMENTS[name])
    source = ast.unparse(ast.fix_missing_locations(tree))
    file = f"<{kind.__name__} with {', '.join(names)} ({next(_numbers)})>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    written.__globals__.setdefault("log", logging.getLogger(__name__))  # Dynamo looks names up in the module
    made_here: dict[str, Any] = {}
    exec(compile(source, file, "exec"), written.__globals__, made_here)
    made = type(
        kind.__name__, (kind,), {"forward": made_here["forward"], "note": _note, "__module__": kind.__module__}
    )
    return made  # type: ignore[return-value]


def _put(function: ast.FunctionDef, statement: Statement) -> None:
    x = function.args.args[1].arg

    def parsed(code: str) -> list[ast.stmt]:
        return ast.parse(code.format(x=x)).body

    loop = next((each for each in function.body if isinstance(each, ast.For)), None)
    if loop is not None:
        loop.body[:0] = parsed(statement.inside)
    function.body[-1:] = [*parsed(statement.after), function.body[-1]]
    function.body[:0] = parsed(statement.before)


def _note(self: nn.Module, x: torch.Tensor) -> None:
    self.noted_shape = x.shape
