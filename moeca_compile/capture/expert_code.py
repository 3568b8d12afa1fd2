"""One expert's code as a function: the statements before its output, with rows and items in place.

y = self.experts[e](x[token]) + self.scale        def moeca_body(moeca_rows_0, moeca_item_0, moeca_shared_0):
                                                      return moeca_item_0(moeca_rows_0) + moeca_shared_0
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeca_compile.capture.dataflow import Value
from moeca_compile.capture.pruning import Pruning
from moeca_compile.capture.roles import Site, dependents, of_self, spelled
from moeca_compile.capture.syntax import (
    HANDED,
    assignment,
    compiled,
    handed,
    located,
    rebuilt,
    roots,
    simple_statements,
)

BODY = "moeca_body"
MATMUL, EINSUM, ROWS, ITEM = "matmul", "einsum", "rows", "item"  # methods of what `moeca` is bound to


class NotRewritableError(Exception):
    """The syntax of a dispatch does not allow it to be replaced."""


def rewritten_body(
    site: Site, original: Callable[..., Any]
) -> tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]] | None:
    """One expert's code alone, as `function(moeca, *rows, *items, *shared)`, with the names of items and shared."""
    code = ExpertCode(site)
    try:
        body = code.body()
    except NotRewritableError:
        return None
    if code.inserted:
        return None  # it needs what only the method around it knows
    names = [tuple(text.partition(".")[2] for text in held) for held in (code.items, code.shared)]
    body.args.args.insert(0, ast.arg(HANDED))
    return compiled(body, original, with_defaults=False), names[0], names[1]


@dataclass(frozen=True)
class Held:
    """What the body is handed of self: its parameter's name, and the attribute."""

    name: str
    source: ast.expr


class ExpertCode:
    """Takes an expert's code out of a method. `inserted` are statements that the method needs for it, by place."""

    def __init__(self, site: Site) -> None:
        self.site, self.flow = site, site.flow
        self.names = self.flow.before[site.statement]
        self.parent = {child: node for node in ast.walk(site.tree) for child in ast.iter_child_nodes(node)}
        self.reads: dict[int, ast.expr] = {}  # what the host reads, in place of the reading
        self.inserted: dict[ast.stmt, list[ast.stmt]] = {}
        self.items: dict[str, Held] = {}  # by the source's text
        self.shared: dict[str, Held] = {}
        self.used = {id(value) for value in site.result.ancestors()}
        self.looped = dependents(self.flow, lambda value: value.kind in ("counter", "element"))
        self.pruning = Pruning(self.flow, self.used)
        self.after_experts = dependents(self.flow, lambda value: id(value) in site.items)

    def name(self, value: Value) -> ast.expr:
        """An expression for `value` where the dispatch stands."""
        name = spelled(value, self.names)
        if name is None:
            name = self.hoisted(value)
        return ast.Name(name, ast.Load())

    def hoisted(self, value: Value) -> str:
        """A new local for a value that has no name there any more, or never had one."""
        name = f"moeca_value_{sum(map(len, self.inserted.values()))}"
        if value.kind == "parameter":
            statement: ast.AST | None = self.site.tree.body[0]
            expression: ast.expr = ast.Name(value.name, ast.Load())
        else:
            statement, expression = value.node, value.node  # type: ignore[assignment]
        while statement is not None and not isinstance(statement, (ast.stmt, ast.comprehension)):
            statement = self.parent.get(statement)
        if not isinstance(statement, ast.stmt) or not isinstance(expression, ast.expr) or self.in_loop(statement):
            raise NotRewritableError
        self.inserted.setdefault(statement, []).append(assignment(name, expression))
        return name

    def in_loop(self, statement: ast.stmt) -> bool:
        node: ast.AST | None = self.parent.get(statement)
        while node is not None and not isinstance(node, (ast.For, ast.While)):
            node = self.parent.get(node)
        return node is not None

    def body(self) -> ast.FunctionDef:
        """One expert as a function: the statements before its output, with rows and items in place."""
        site = self.site
        replaced = self.placeholders()
        statements, result = self.up_to_output()
        built = [rebuilt(each, replaced) for each in statements]
        returned = rebuilt(result, replaced)
        built, _ = self.pruning.pruned([*built, ast.Return(returned)], set())
        used = {node.id for each in built for node in ast.walk(each) if isinstance(node, ast.Name)}
        self.items = {text: held for text, held in self.items.items() if held.name in used}
        self.shared = {text: held for text, held in self.shared.items() if held.name in used}
        names = [f"moeca_rows_{i}" for i in range(len(site.rows))]
        names += [held.name for held in [*self.items.values(), *self.shared.values()]]
        arguments = ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])
        return located(ast.FunctionDef(BODY, arguments, built, [], None, None))

    def placeholders(self) -> Callable[[ast.AST], ast.AST | None]:
        """What stands in the body for an expression of the original."""
        rows = {
            id(leaf): self.rows(f"moeca_rows_{number}", leaf)
            for number, leaves in enumerate(self.site.rows.values())
            for leaf in leaves
        }

        def replacement(node: ast.AST) -> ast.AST | None:
            value = self.flow.at.get(node)
            if value is None or (isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)):
                return None
            if id(value) in rows:
                return rows[id(value)]
            if id(value) in self.site.items:
                return self.item(value)
            if isinstance(node, ast.Call) and self.is_bank(value):
                return self.of_bank(node, value, replacement)
            if isinstance(node, ast.Call) and value.name in ("grouped_mm", "_grouped_mm", "bmm", "matmul"):
                return handed(MATMUL, [rebuilt(each, replacement) for each in self.factors(node)])
            if isinstance(node, ast.Call) and value.name == "einsum" and len(node.args) == 3:
                return handed(EINSUM, [rebuilt(each, replacement) for each in node.args])
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
                return handed(MATMUL, [rebuilt(each, replacement) for each in (node.left, node.right)])
            if of_self(value) and isinstance(node, ast.Attribute):
                return self.placeholder(self.shared, "moeca_shared", node)
            if isinstance(node, ast.Call) and self.is_method_of_self(node.func):
                shared = self.placeholder(self.shared, "moeca_shared", node.func)
                arguments = rebuilt(node.args, replacement)
                return ast.Call(shared, arguments, rebuilt(node.keywords, replacement))
            return None

        return replacement

    def rows(self, name: str, leaf: Value) -> ast.expr:
        """Rows in place of `leaf`; of all tokens, with the dimensions that it has beside tokens and width."""
        rows = ast.Name(name, ast.Load())
        if not self.site.whole_rows or id(leaf) in self.looped:
            return rows
        return handed(ROWS, [rows, self.dims(leaf)])

    def dims(self, value: Value) -> ast.expr:
        """The number of dimensions of `value`, as a local for the body: a number, where it may read no tensor."""
        of_value = ast.Attribute(self.name(value), "ndim", ast.Load())
        lines = self.inserted.setdefault(self.site.statement, [])
        lines.append(assignment(f"moeca_dims_{len(lines)}", of_value))
        return ast.Name(f"moeca_dims_{len(lines) - 1}", ast.Load())

    def factors(self, node: ast.Call) -> list[ast.expr]:
        receiver = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        given = [*receiver, *node.args] if receiver and self.is_value(receiver[0]) else list(node.args)
        if len(given) < 2:
            raise NotRewritableError
        return given[:2]

    def is_value(self, node: ast.expr) -> bool:
        value = self.flow.at.get(node)
        return value is not None and next(iter(roots(value))).kind != "global"

    def item(self, value: Value) -> ast.expr:
        item = self.site.items[id(value)]
        name = self.placeholder(self.items, "moeca_item", item.source.node)
        if item.bank:
            return name
        if item.gathered is not None:
            # As if the ids of one branch had been looked up: the dimensions of the ids, each of size 1.
            return handed(ITEM, [name, self.dims(item.gathered)])
        return ast.Subscript(name, ast.Constant(None), ast.Load()) if item.grouped else name

    def is_bank(self, call: Value) -> bool:
        callee = self.site.items.get(id(call.operands[0])) if call.operands else None
        return callee is not None and callee.bank

    def of_bank(self, node: ast.Call, call: Value, replacement: Callable[[ast.AST], ast.AST | None]) -> ast.Call:
        """One expert of a module that runs all: it stands for whatever tells which rows are whose, too."""
        leaves = {id(leaf) for leaves in self.site.rows.values() for leaf in leaves}

        def argument(given: ast.expr) -> ast.expr:
            value = self.flow.at[given]
            plain = id(value) in leaves or value.kind == "constant"
            new: ast.expr = rebuilt(given, replacement) if plain else self.item(call.operands[0])
            return new

        keywords = [ast.keyword(each.arg, argument(each.value)) for each in node.keywords]
        return ast.Call(self.item(call.operands[0]), [argument(each) for each in node.args], keywords)

    def is_method_of_self(self, function: ast.expr) -> bool:
        return (
            isinstance(function, ast.Attribute)
            and isinstance(function.value, ast.Name)
            and function.value.id == self.flow.self_name
        )

    def placeholder(self, known: dict[str, Held], prefix: str, source: ast.AST | None) -> ast.Name:
        if not isinstance(source, ast.expr):
            raise NotRewritableError
        held = known.setdefault(ast.unparse(source), Held(f"{prefix}_{len(known)}", source))
        return ast.Name(held.name, ast.Load())

    def up_to_output(self) -> tuple[list[ast.stmt], ast.expr]:
        """The simple statements before an expert's output, and an expression for it."""
        site, node = self.site, self.site.y.node
        statement: ast.AST | None = node
        while statement is not None and not isinstance(statement, ast.stmt):
            statement = self.parent.get(statement)
        if statement is None or node is None:
            raise NotRewritableError
        simple = list(simple_statements(site.tree.body))
        before = simple[: simple.index(statement)]
        start = self.first_of_loop(statement)
        before = [each for each in before if each in start]
        if isinstance(node, ast.expr) and id(self.flow.at.get(node)) == id(site.y):
            return before, node
        name = spelled(site.y, self.flow.after[statement])
        if name is None:
            raise NotRewritableError
        return [*before, statement], ast.Name(name, ast.Load())

    def first_of_loop(self, statement: ast.stmt) -> set[ast.AST]:
        """The statements that belong to one expert: of the loop, or all of the method where there is none."""
        node: ast.AST | None = statement
        loop: ast.AST = self.site.tree
        while node is not None:
            loop = node if isinstance(node, ast.For) else loop
            node = self.parent.get(node)
        return set(ast.walk(loop))
