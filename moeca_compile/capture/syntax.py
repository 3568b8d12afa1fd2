"""Syntax trees: what statements bind and read, trees with parts replaced, and new functions."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any

from moeca_compile.capture.dataflow import Value

HANDED = "moeca"  # the first parameter of a rewritten method


def with_blocks(statement: ast.stmt, blocks: dict[str, list[ast.stmt]]) -> ast.stmt:
    """A compound statement with other blocks; the same object where they are the old ones."""
    if all(_same(blocks[field], getattr(statement, field)) for field in blocks):
        return statement
    values = {name: getattr(statement, name) for name in statement._fields} | blocks
    values["body"] = values["body"] or [located(ast.Pass())]
    return ast.copy_location(type(statement)(**values), statement)


def roots(value: Value) -> Iterator[Value]:
    while value.operands:
        value = value.operands[0]
    yield value


def names_bound(statement: ast.stmt) -> set[str] | None:
    """The locals that a statement binds or changes; None where it may do more."""
    if isinstance(statement, ast.Assign):
        roots = [_root(part) for target in statement.targets for part in _parts(target)]
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
        roots = [_root(statement.target)]
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        roots = [_root(statement.value)]
    elif isinstance(statement, ast.FunctionDef):
        roots = [statement.name]
    else:
        return None
    return set(roots) if all(roots) else None


def _parts(target: ast.expr) -> list[ast.expr]:
    if isinstance(target, (ast.Tuple, ast.List)):
        return [inner for part in target.elts for inner in _parts(part)]
    return [target.value if isinstance(target, ast.Starred) else target]


def _root(node: ast.expr) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            return ""  # x.a = ... changes more than a local
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def plain_names(target: ast.expr) -> set[str]:
    return {part.id for part in _parts(target) if isinstance(part, ast.Name)}


def names_read(statement: ast.stmt) -> set[str]:
    """The names that a statement reads; a name changed in place is read too."""
    read = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    if isinstance(statement, ast.AugAssign):
        read.add(_root(statement.target))
    if isinstance(statement, ast.FunctionDef):
        read -= {argument.arg for argument in statement.args.args}
        read -= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return read


def simple_statements(statements: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements inside loops, conditions and with, one after another, without the jumps."""
    for statement in statements:
        inner = [*getattr(statement, "body", []), *getattr(statement, "orelse", [])]
        if inner:
            yield from simple_statements(inner)
        elif not isinstance(statement, (ast.Continue, ast.Break, ast.Pass)):
            yield statement


def rebuilt(node: Any, replacement: Callable[[ast.AST], ast.AST | None]) -> Any:
    """A tree with some nodes replaced; what holds none of them is the same object as before."""
    if isinstance(node, list):
        return [rebuilt(each, replacement) for each in node]
    if not isinstance(node, ast.AST):
        return node
    new = replacement(node)
    if new is not None:
        return ast.copy_location(new, node)
    fields = {name: getattr(node, name, None) for name in node._fields}
    built = {name: rebuilt(value, replacement) for name, value in fields.items()}
    if all(_same(built[name], fields[name]) for name in fields):
        return node
    return ast.copy_location(type(node)(**built), node)


def _same(new: Any, old: Any) -> bool:
    if isinstance(old, list):
        return len(new) == len(old) and all(a is b for a, b in zip(new, old, strict=True))
    return new is old


# new syntax and new functions


def handed(function: str, arguments: list[ast.expr]) -> ast.Call:
    return located(ast.Call(ast.Attribute(ast.Name(HANDED, ast.Load()), function, ast.Load()), arguments, []))


def tuple_of(elements: list[ast.expr]) -> ast.Tuple:
    return ast.Tuple(elements, ast.Load())


def assignment(name: str, value: ast.expr) -> ast.Assign:
    return located(ast.Assign([ast.Name(name, ast.Store())], value, None))


def located(node: Any) -> Any:
    node.lineno, node.col_offset, node.end_lineno, node.end_col_offset = 1, 0, 1, 0
    return node


def with_statements(tree: ast.FunctionDef, statements: list[ast.stmt]) -> ast.FunctionDef:
    """`tree` with other statements and one more parameter, without decorators and annotations."""
    old = tree.args
    first = [ast.arg(HANDED)]
    plain = {
        name: [ast.arg(each.arg) for each in getattr(old, name)] for name in ("posonlyargs", "args", "kwonlyargs")
    }
    plain["posonlyargs" if plain["posonlyargs"] else "args"][:0] = first
    arguments = ast.arguments(
        **plain,
        vararg=old.vararg and ast.arg(old.vararg.arg),
        kwarg=old.kwarg and ast.arg(old.kwarg.arg),
        defaults=[ast.Constant(None) for _ in old.defaults],  # the function gets the original's values
        kw_defaults=[each and ast.Constant(None) for each in old.kw_defaults],
    )
    return ast.copy_location(ast.FunctionDef(tree.name, arguments, statements, [], None, None), tree)


def compiled(tree: ast.FunctionDef, original: Callable[..., Any], with_defaults: bool = True) -> Callable[..., Any]:
    """The tree as a function with the original's globals, defaults and closure."""
    code = original.__code__
    free = code.co_freevars
    outer_arguments = ast.arguments([], [ast.arg(name) for name in free], None, [], [], None, [])
    outer = ast.FunctionDef("moeca_factory", outer_arguments, [tree], [], None, None)
    module = ast.Module([located(outer)], [])
    for node in ast.walk(module):
        if "type_params" in node._fields and not isinstance(getattr(node, "type_params", None), list):
            node.type_params = []  # type: ignore[attr-defined]  # from Python 3.12 on
    ast.fix_missing_locations(module)
    ast.increment_lineno(module, code.co_firstlineno - 1)
    inner = _code_named(_code_named(compile(module, code.co_filename, "exec"), "moeca_factory"), tree.name)
    cells = dict(zip(free, original.__closure__ or (), strict=True))
    function = FunctionType(inner, original.__globals__, tree.name, None, tuple(cells[n] for n in inner.co_freevars))
    if with_defaults:
        function.__defaults__, function.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
    function.__qualname__, function.__module__ = original.__qualname__, original.__module__
    return function


def _code_named(code: CodeType, name: str) -> CodeType:
    return next(each for each in code.co_consts if isinstance(each, CodeType) and each.co_name == name)
