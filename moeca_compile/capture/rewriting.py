"""Rewrites a method so that its dispatch is a call of what it is handed; all else stays as written.

    def forward(self, x):                             def forward(moeca, self, x):
        weight, index = self.router(x)                    weight, index = self.router(x)
        out = torch.zeros_like(x)                         out = torch.zeros_like(x)
        for e in range(self.num_experts):                 def moeca_body(moeca_rows_0, moeca_item_0):
            token, slot = torch.where(index == e)             return moeca_item_0(moeca_rows_0)
            y = self.experts[e](x[token])                 out = moeca.experts(
            y = y * weight[token, slot, None]                 out, (x,), index, weight, moeca_body,
            out.index_add_(0, token, y)                       (self.experts,), ())
        return out + self.shared(x)                       return out + self.shared(x)

Statements that only served the dispatch go. What the experts' code reads of self besides their own parameters
is handed to the body too, as shared items: the graph of a body may hold nothing else.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from moeca_compile.capture.dataflow import CALLS_SELF, Value
from moeca_compile.capture.site import Site, base_of, dependents, of_self, spelled

EXPERTS, MATMUL, EINSUM, ROWS, ITEM = "experts", "matmul", "einsum", "rows", "item"  # of what `moeca` is bound to
CHOICES = frozenset({"topk", "argmax", "max", "sort", "argsort", "multinomial"})
REPLACES = frozenset({"where", "masked_fill", "masked_fill_", "index_put_", "masked_scatter_", "clamp"})
HANDED, BODY, LIKE = "moeca", "moeca_body", "moeca_like"


class _NotRewritableError(Exception):
    pass


@dataclass(frozen=True)
class Rewritten:
    """A method as `function(moeca, self, ...)`.

    items, shared: the attributes of self that hold the experts' own parameters or modules, and what all experts
    read; index: the parameter that holds the expert ids, None where the method makes them itself; may_miss:
    whether the method puts other numbers among them, for tokens that no expert takes

    What `moeca` has to have:
    experts(like, rows, index, weight, body, items, shared): the dispatch. rows is a tuple of per-token inputs;
        body is a function of rows, an expert's items and the shared ones; like has the result's shape, or is None
    matmul(a, b): the product of rows and one expert's matrix, which may have leading dimensions of 1
    einsum(equation, a, b): the same as an einsum
    rows(rows, dims): rows (n, width) with so many dimensions, those between of size 1
    item(item, dims): an item with so many leading dimensions of size 1 more
    """

    function: Callable[..., Any]
    items: tuple[str, ...]
    shared: tuple[str, ...]
    index: str | None
    may_miss: bool


def rewritten(site: Site, original: Callable[..., Any]) -> Rewritten | None:
    """`original` (innermost, undecorated), rewritten; None where that fails."""
    rewriting = _Rewriting(site)
    try:
        tree = rewriting.tree()
    except _NotRewritableError:
        return None
    index = base_of(site.index)
    return Rewritten(
        _compiled(tree, original),
        tuple(text.partition(".")[2] for text in rewriting.items),
        tuple(text.partition(".")[2] for text in rewriting.shared),
        index.name if index.kind == "parameter" else None,
        _may_miss(site.index),
    )


def _may_miss(index: Value) -> bool:
    """Whether ids are replaced after the router's choice, as by `torch.where(kept, index, num_experts)`."""
    pending = [index]
    while pending:
        value = pending.pop()
        if value.kind == "call" and value.name in REPLACES:
            return True
        if value.kind != "call" or value.name not in CHOICES:
            pending.extend(value.operands)
    return False


@dataclass(frozen=True)
class _Held:
    """What the body is handed of self: its parameter's name, and the attribute."""

    name: str
    source: ast.expr


class _Rewriting:
    def __init__(self, site: Site) -> None:
        self.site, self.flow = site, site.flow
        self.names = self.flow.before[site.statement]
        self.parent = {child: node for node in ast.walk(site.tree) for child in ast.iter_child_nodes(node)}
        self.inserted: dict[ast.stmt, list[ast.stmt]] = {}
        self.items: dict[str, _Held] = {}  # by the source's text
        self.shared: dict[str, _Held] = {}
        self.used = {id(value) for value in site.result.ancestors()}
        self.after_experts = dependents(self.flow, lambda value: id(value) in site.items)

    def tree(self) -> ast.FunctionDef:
        site = self.site
        body = self.body()
        call = self.call()
        self.inserted.setdefault(site.statement, []).append(body)
        replaced: dict[int, ast.expr] = {id(site.result.node): call}
        statements = self.block(site.tree.body, replaced)
        statements, _ = self.pruned(statements, set())
        if any(node in (site.product.node, site.y.node) for each in statements for node in ast.walk(each)):
            raise _NotRewritableError
        return _function(site.tree, statements)

    # the call

    def call(self) -> ast.Call:
        site = self.site
        rows = _tuple([self.name(base) for base in site.rows])
        like: ast.expr = ast.Constant(None)
        if isinstance(site.statement, ast.For):
            like = ast.Name(LIKE, ast.Load())
            zeros = ast.Name(self.target(), ast.Load())
            self.inserted.setdefault(site.statement, []).append(_assign(LIKE, zeros))
        return _call(
            EXPERTS,
            [
                like,
                rows,
                self.name(site.index),
                self.name(site.weight),
                ast.Name(BODY, ast.Load()),
                _tuple([held.source for held in self.items.values()]),
                _tuple([held.source for held in self.shared.values()]),
            ],
        )

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
            raise _NotRewritableError
        self.inserted.setdefault(statement, []).append(_assign(name, expression))
        return name

    def in_loop(self, statement: ast.stmt) -> bool:
        node: ast.AST | None = self.parent.get(statement)
        while node is not None and not isinstance(node, (ast.For, ast.While)):
            node = self.parent.get(node)
        return node is not None

    def target(self) -> str:
        """The local that holds the result after the loop."""
        names = [name for name, value in self.flow.after[self.site.statement].items() if value is self.site.result]
        if len(names) != 1 or names[0] not in self.names:
            raise _NotRewritableError
        return names[0]

    # the body

    def body(self) -> ast.FunctionDef:
        """One expert as a function: the statements before its output, with rows and items in place."""
        site = self.site
        replaced = self.placeholders()
        statements, result = self.up_to_output()
        built = [_rebuilt(each, replaced) for each in statements]
        returned = _rebuilt(result, replaced)
        built, _ = self.pruned([*built, ast.Return(returned)], set())
        used = {node.id for each in built for node in ast.walk(each) if isinstance(node, ast.Name)}
        self.items = {text: held for text, held in self.items.items() if held.name in used}
        self.shared = {text: held for text, held in self.shared.items() if held.name in used}
        names = [f"moeca_rows_{i}" for i in range(len(site.rows))]
        names += [held.name for held in [*self.items.values(), *self.shared.values()]]
        arguments = ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])
        return _located(ast.FunctionDef(BODY, arguments, built, [], None, None))

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
            if isinstance(node, ast.Call) and value.name in ("grouped_mm", "_grouped_mm", "bmm", "matmul"):
                return _call(MATMUL, [_rebuilt(each, replacement) for each in self.factors(node)])
            if isinstance(node, ast.Call) and value.name == "einsum" and len(node.args) == 3:
                return _call(EINSUM, [_rebuilt(each, replacement) for each in node.args])
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
                return _call(MATMUL, [_rebuilt(each, replacement) for each in (node.left, node.right)])
            if of_self(value) and isinstance(node, ast.Attribute):
                return self.placeholder(self.shared, "moeca_shared", node)
            if isinstance(node, ast.Call) and self.is_method_of_self(node.func):
                shared = self.placeholder(self.shared, "moeca_shared", node.func)
                arguments = _rebuilt(node.args, replacement)
                return ast.Call(shared, arguments, _rebuilt(node.keywords, replacement))
            return None

        return replacement

    def rows(self, name: str, leaf: Value) -> ast.expr:
        """Rows in place of `leaf`; of all tokens, with the dimensions that it has beside tokens and width."""
        rows = ast.Name(name, ast.Load())
        if not self.site.whole_rows:
            return rows
        return _call(ROWS, [rows, self.dims(leaf)])

    def dims(self, value: Value) -> ast.expr:
        """The number of dimensions of `value`, as a local for the body: a number, where it may read no tensor."""
        of_value = ast.Attribute(self.name(value), "ndim", ast.Load())
        lines = self.inserted.setdefault(self.site.statement, [])
        lines.append(_assign(f"moeca_dims_{len(lines)}", of_value))
        return ast.Name(f"moeca_dims_{len(lines) - 1}", ast.Load())

    def factors(self, node: ast.Call) -> list[ast.expr]:
        receiver = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        given = [*receiver, *node.args] if receiver and self.is_value(receiver[0]) else list(node.args)
        if len(given) < 2:
            raise _NotRewritableError
        return given[:2]

    def is_value(self, node: ast.expr) -> bool:
        value = self.flow.at.get(node)
        return value is not None and next(iter(_roots(value))).kind != "global"

    def item(self, value: Value) -> ast.expr:
        item = self.site.items[id(value)]
        name = self.placeholder(self.items, "moeca_item", item.source.node)
        if item.gathered is not None:
            # As if the ids of one branch had been looked up: the dimensions of the ids, each of size 1.
            return _call(ITEM, [name, self.dims(item.gathered)])
        return ast.Subscript(name, ast.Constant(None), ast.Load()) if item.grouped else name

    def is_method_of_self(self, function: ast.expr) -> bool:
        return (
            isinstance(function, ast.Attribute)
            and isinstance(function.value, ast.Name)
            and function.value.id == self.flow.self_name
        )

    def placeholder(self, known: dict[str, _Held], prefix: str, source: ast.AST | None) -> ast.Name:
        if not isinstance(source, ast.expr):
            raise _NotRewritableError
        held = known.setdefault(ast.unparse(source), _Held(f"{prefix}_{len(known)}", source))
        return ast.Name(held.name, ast.Load())

    def up_to_output(self) -> tuple[list[ast.stmt], ast.expr]:
        """The simple statements before an expert's output, and an expression for it."""
        site, node = self.site, self.site.y.node
        statement: ast.AST | None = node
        while statement is not None and not isinstance(statement, ast.stmt):
            statement = self.parent.get(statement)
        if statement is None or node is None:
            raise _NotRewritableError
        simple = list(_simple(site.tree.body))
        before = simple[: simple.index(statement)]
        start = self.first_of_loop(statement)
        before = [each for each in before if each in start]
        if isinstance(node, ast.expr) and id(self.flow.at.get(node)) == id(site.y):
            return before, node
        name = spelled(site.y, self.flow.after[statement])
        if name is None:
            raise _NotRewritableError
        return [*before, statement], ast.Name(name, ast.Load())

    def first_of_loop(self, statement: ast.stmt) -> set[ast.AST]:
        """The statements that belong to one expert: of the loop, or all of the method where there is none."""
        node: ast.AST | None = statement
        loop: ast.AST = self.site.tree
        while node is not None:
            loop = node if isinstance(node, ast.For) else loop
            node = self.parent.get(node)
        return set(ast.walk(loop))

    # what is left of the method

    def block(self, statements: Sequence[ast.stmt], replaced: dict[int, ast.expr]) -> list[ast.stmt]:
        new: list[ast.stmt] = []
        for statement in statements:
            new.extend(self.inserted.get(statement, []))
            new.append(self.statement(statement, replaced))
            if statement is self.site.statement and isinstance(statement, ast.For):
                # The loop stays before it, to be pruned if nothing else that it does is needed.
                new.append(_assign(self.target(), replaced[id(self.site.result.node)]))
        return new

    def statement(self, statement: ast.stmt, replaced: dict[int, ast.expr]) -> ast.stmt:
        site = self.site
        if statement is site.statement:
            if isinstance(statement, ast.For):
                return statement
            if isinstance(statement, (ast.Expr, ast.AugAssign)) or isinstance(site.result.node, ast.Subscript):
                name = spelled(site.result, self.flow.after[statement])
                if name is None:
                    raise _NotRewritableError
                return _assign(name, replaced[id(site.result.node)])
            return _rebuilt(statement, lambda node: replaced.get(id(node)) or self.type_of_branches(node))
        fields = [field for field in ("body", "orelse") if hasattr(statement, field)]
        if not fields:
            return _rebuilt(statement, self.type_of_branches)
        return _with_blocks(statement, {field: self.block(getattr(statement, field), replaced) for field in fields})

    def type_of_branches(self, node: ast.AST) -> ast.expr | None:
        """`branches.dtype`, where there are no branches any more, is taken from the rows."""
        if not isinstance(node, ast.Attribute) or node.attr not in ("dtype", "device"):
            return None
        value = self.flow.at.get(node.value)
        if value is None or value is self.site.result or id(value) not in self.used & self.after_experts:
            return None
        return ast.Attribute(self.name(next(iter(self.site.rows))), node.attr, ast.Load())

    def pruned(self, statements: Sequence[ast.stmt], live: set[str]) -> tuple[list[ast.stmt], set[str]]:
        """The statements without those whose results nobody reads, and the names that they read."""
        kept: list[ast.stmt] = []
        for statement in reversed(statements):
            left = self.without_idle_parts(statement, live)
            if left is None:
                continue
            if isinstance(left, (ast.Assign, ast.AnnAssign)):
                targets = left.targets if isinstance(left, ast.Assign) else [left.target]
                live = live - {name for target in targets for name in _plain_names(target)}
            kept.insert(0, left)
            live = live | _read(left)
        return kept, live

    def without_idle_parts(self, statement: ast.stmt, live: set[str]) -> ast.stmt | None:
        if isinstance(statement, (ast.If, ast.With)):
            parts = {
                field: self.pruned(getattr(statement, field), live)[0]
                for field in ("body", "orelse")
                if hasattr(statement, field)
            }
            if not any(parts.values()):
                return None
            return _with_blocks(statement, parts)
        simple = [statement]
        if isinstance(statement, ast.For):
            simple = list(_simple([statement]))
            if _plain_names(statement.target) & live:
                return statement
        return None if all(self.idle(each, live) for each in simple) else statement

    def idle(self, statement: ast.stmt, live: set[str]) -> bool:
        """Whether a statement changes nothing but locals that nobody reads any more."""
        bound = _bound(statement)
        if bound is None or bound & live:
            return False
        inside = set(ast.walk(statement))
        for problem in self.flow.problems:
            if problem.node in inside:
                value = self.flow.at.get(problem.node)
                if problem.what != CALLS_SELF or id(value) not in self.used:
                    return False
        return True


def _with_blocks(statement: ast.stmt, blocks: dict[str, list[ast.stmt]]) -> ast.stmt:
    """A compound statement with other blocks; the same object where they are the old ones."""
    if all(_same(blocks[field], getattr(statement, field)) for field in blocks):
        return statement
    values = {name: getattr(statement, name) for name in statement._fields} | blocks
    values["body"] = values["body"] or [_located(ast.Pass())]
    return ast.copy_location(type(statement)(**values), statement)


def _roots(value: Value) -> Iterator[Value]:
    while value.operands:
        value = value.operands[0]
    yield value


def _bound(statement: ast.stmt) -> set[str] | None:
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


def _plain_names(target: ast.expr) -> set[str]:
    return {part.id for part in _parts(target) if isinstance(part, ast.Name)}


def _read(statement: ast.stmt) -> set[str]:
    """The names that a statement reads; a name changed in place is read too."""
    read = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    if isinstance(statement, ast.AugAssign):
        read.add(_root(statement.target))
    if isinstance(statement, ast.FunctionDef):
        read -= {argument.arg for argument in statement.args.args}
        read -= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return read


def _simple(statements: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements inside loops, conditions and with, one after another, without the jumps."""
    for statement in statements:
        inner = [*getattr(statement, "body", []), *getattr(statement, "orelse", [])]
        if inner:
            yield from _simple(inner)
        elif not isinstance(statement, (ast.Continue, ast.Break, ast.Pass)):
            yield statement


def _rebuilt(node: Any, replacement: Callable[[ast.AST], ast.AST | None]) -> Any:
    """A tree with some nodes replaced; what holds none of them is the same object as before."""
    if isinstance(node, list):
        return [_rebuilt(each, replacement) for each in node]
    if not isinstance(node, ast.AST):
        return node
    new = replacement(node)
    if new is not None:
        return ast.copy_location(new, node)
    fields = {name: getattr(node, name, None) for name in node._fields}
    built = {name: _rebuilt(value, replacement) for name, value in fields.items()}
    if all(_same(built[name], fields[name]) for name in fields):
        return node
    return ast.copy_location(type(node)(**built), node)


def _same(new: Any, old: Any) -> bool:
    if isinstance(old, list):
        return len(new) == len(old) and all(a is b for a, b in zip(new, old, strict=True))
    return new is old


# new syntax and new functions


def _call(function: str, arguments: list[ast.expr]) -> ast.Call:
    return _located(ast.Call(ast.Attribute(ast.Name(HANDED, ast.Load()), function, ast.Load()), arguments, []))


def _tuple(elements: list[ast.expr]) -> ast.Tuple:
    return ast.Tuple(elements, ast.Load())


def _assign(name: str, value: ast.expr) -> ast.Assign:
    return _located(ast.Assign([ast.Name(name, ast.Store())], value, None))


def _located(node: Any) -> Any:
    node.lineno, node.col_offset, node.end_lineno, node.end_col_offset = 1, 0, 1, 0
    return node


def _function(tree: ast.FunctionDef, statements: list[ast.stmt]) -> ast.FunctionDef:
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


def _compiled(tree: ast.FunctionDef, original: Callable[..., Any]) -> Callable[..., Any]:
    """The tree as a function with the original's globals, defaults and closure."""
    code = original.__code__
    free = code.co_freevars
    outer_arguments = ast.arguments([], [ast.arg(name) for name in free], None, [], [], None, [])
    outer = ast.FunctionDef("moeca_factory", outer_arguments, [tree], [], None, None)
    module = ast.Module([_located(outer)], [])
    for node in ast.walk(module):
        if "type_params" in node._fields and not isinstance(getattr(node, "type_params", None), list):
            node.type_params = []  # type: ignore[attr-defined]  # from Python 3.12 on
    ast.fix_missing_locations(module)
    ast.increment_lineno(module, code.co_firstlineno - 1)
    inner = _code_named(_code_named(compile(module, code.co_filename, "exec"), "moeca_factory"), tree.name)
    cells = dict(zip(free, original.__closure__ or (), strict=True))
    function = FunctionType(
        inner, original.__globals__, tree.name, original.__defaults__, tuple(cells[n] for n in inner.co_freevars)
    )
    function.__kwdefaults__ = original.__kwdefaults__
    function.__qualname__, function.__module__ = original.__qualname__, original.__module__
    return function


def _code_named(code: CodeType, name: str) -> CodeType:
    return next(each for each in code.co_consts if isinstance(each, CodeType) and each.co_name == name)
