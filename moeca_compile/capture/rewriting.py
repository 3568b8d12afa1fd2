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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moeca_compile.capture.dataflow import Value
from moeca_compile.capture.pruning import Pruning
from moeca_compile.capture.roles import ADDS_UP, SHAPES, Site, base_of, dependents, of_self, spelled
from moeca_compile.capture.syntax import (
    HANDED,
    assignment,
    compiled,
    handed,
    located,
    rebuilt,
    roots,
    simple_statements,
    tuple_of,
    with_blocks,
    with_statements,
)
from moeca_compile.capture.turns import CHOSEN, WEIGHTS, Turns

# The methods of what `moeca` is bound to.
EXPERTS, PAIRS, MATMUL, EINSUM, ROWS, ITEM = "experts", "pairs", "matmul", "einsum", "rows", "item"
CHOICES = frozenset({"topk", "argmax", "max", "sort", "argsort", "multinomial"})
REPLACES = frozenset({"where", "masked_fill", "masked_fill_", "index_put_", "masked_scatter_", "clamp"})
BODY, LIKE = "moeca_body", "moeca_like"


class _NotRewritableError(Exception):
    pass


@dataclass(frozen=True)
class Rewritten:
    """A method as `function(moeca, self, ...)`.

    items, shared: the attributes of self that hold the experts' own parameters or modules, and what all experts
    read; index: the parameter that holds the ids, None where the method makes them itself; may_miss:
    whether there may be other numbers among them, for tokens that no expert takes; by_ids: whether ids were found,
    and not only what each turn of a loop makes of them

    What `moeca` has to have:
    experts(like, rows, index, weight, body, items, shared): the dispatch, by expert ids. rows is a tuple of
        per-token inputs; body is a function of rows, an expert's items and the shared ones; like has the
        result's shape, or is None
    pairs(like, rows, index, weight, body, items, shared): the same by token ids, or by lists of what each expert
        takes; with top, first, placed, places, number, max and min (turns.py)
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
    by_ids: bool


def rewritten(site: Site, original: Callable[..., Any]) -> Rewritten | None:
    """`original` (innermost, undecorated), rewritten; None where that fails."""
    rewriting = _Rewriting(site)
    try:
        tree = rewriting.tree()
    except _NotRewritableError:
        return None
    index = base_of(site.index)
    given = index.kind == "parameter"
    return Rewritten(
        compiled(tree, original),
        tuple(text.partition(".")[2] for text in rewriting.items),
        tuple(text.partition(".")[2] for text in rewriting.shared),
        index.name if given else None,
        given or _may_miss(site.index),
        site.selection is None,
    )


def rewritten_body(
    site: Site, original: Callable[..., Any]
) -> tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]] | None:
    """One expert's code alone, as `function(moeca, *rows, *items, *shared)`, with the names of items and shared."""
    rewriting = _Rewriting(site)
    try:
        body = rewriting.body()
    except _NotRewritableError:
        return None
    if rewriting.inserted:
        return None  # it needs what only the method around it knows
    names = [tuple(text.partition(".")[2] for text in held) for held in (rewriting.items, rewriting.shared)]
    body.args.args.insert(0, ast.arg(HANDED))
    return compiled(body, original, with_defaults=False), names[0], names[1]


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
        self.reads: dict[int, ast.expr] = {}  # what the host reads, in place of the reading
        self.inserted: dict[ast.stmt, list[ast.stmt]] = {}
        self.items: dict[str, _Held] = {}  # by the source's text
        self.shared: dict[str, _Held] = {}
        self.used = {id(value) for value in site.result.ancestors()}
        self.looped = dependents(self.flow, lambda value: value.kind in ("counter", "element"))
        self.pruning = Pruning(self.flow, self.used)
        self.after_experts = dependents(self.flow, lambda value: id(value) in site.items)

    def tree(self) -> ast.FunctionDef:
        site = self.site
        body = self.body()
        call = self.call()
        self.inserted.setdefault(site.statement, []).append(body)
        replaced: dict[int, ast.expr] = {id(site.result.node): call}
        statements = self.block(site.tree.body, replaced)
        statements, _ = self.pruning.pruned(statements, set())
        if any(node in (site.product.node, site.y.node) for each in statements for node in ast.walk(each)):
            raise _NotRewritableError
        return with_statements(site.tree, statements)

    # the call

    def call(self) -> ast.expr:
        site, like = self.site, self.like()
        rows = tuple_of([self.name(base) for base in site.rows])
        call = handed(
            PAIRS if site.pairs else EXPERTS,
            [
                like,
                rows,
                *self.routing(),
                ast.Name(BODY, ast.Load()),
                tuple_of([held.source for held in self.items.values()]),
                tuple_of([held.source for held in self.shared.values()]),
            ],
        )
        return call if site.base is None else located(ast.BinOp(like, ast.Add(), call))

    def routing(self) -> list[ast.expr]:
        """Ids and weights: of all experts, or lists of what each turn of the loop makes of them."""
        site = self.site
        if site.selection is None:
            return [self.name(site.index), self.name(site.weight)]
        turns = Turns(site, self.pruning)
        loop = turns.loop()
        if loop is None:
            raise _NotRewritableError
        self.inserted.setdefault(site.statement, []).extend(loop)
        self.reads = turns.reads
        return [ast.Name(CHOSEN, ast.Load()), ast.Name(WEIGHTS, ast.Load())]

    def like(self) -> ast.expr:
        """What has the result's shape: that to which the products are added."""
        site = self.site
        if isinstance(site.statement, ast.For):
            zeros = ast.Name(self.target(), ast.Load())
            self.inserted.setdefault(site.statement, []).append(assignment(LIKE, zeros))
            return ast.Name(LIKE, ast.Load())
        if site.pairs and site.result.name in ADDS_UP - {"sum", "Add"}:
            return self.name(self.changed(site.result.operands[0]))
        return ast.Constant(None)

    def changed(self, value: Value) -> Value:
        """What `value` is a view of, where a statement changes that through the view."""
        while isinstance(self.site.statement, ast.Expr) and value.kind == "call" and value.name in SHAPES:
            value = value.operands[0]
        return value

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
        self.inserted.setdefault(statement, []).append(assignment(name, expression))
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
            raise _NotRewritableError
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
        simple = list(simple_statements(site.tree.body))
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
                new.append(assignment(self.target(), replaced[id(self.site.result.node)]))
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
                return assignment(name, replaced[id(site.result.node)])
            return rebuilt(statement, lambda node: replaced.get(id(node)) or self.elsewhere(node))
        fields = [field for field in ("body", "orelse") if hasattr(statement, field)]
        if not fields:
            return rebuilt(statement, self.elsewhere)
        return with_blocks(statement, {field: self.block(getattr(statement, field), replaced) for field in fields})

    def elsewhere(self, node: ast.AST) -> ast.expr | None:
        """Outside the dispatch: `branches.dtype`, where there are no branches any more, is taken from the rows.

        What the host reads of the choice stays on the device.
        """
        if id(node) in self.reads:
            return self.reads[id(node)]
        if not isinstance(node, ast.Attribute) or node.attr not in ("dtype", "device"):
            return None
        value = self.flow.at.get(node.value)
        if value is None or value is self.site.result or id(value) not in self.used & self.after_experts:
            return None
        return ast.Attribute(self.name(next(iter(self.site.rows))), node.attr, ast.Load())
