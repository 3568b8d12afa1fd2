"""Rewrites a method so that its dispatch is a call of what it is handed; all else stays as written.

    def forward(self, x):                             def forward(moeca, self, x):
        weight, index = self.router(x)                    weight, index = self.router(x)
        out = torch.zeros_like(x)                         out = torch.zeros_like(x)
        for e in range(self.num_experts):                 def moeca_body(moeca_rows_0, moeca_item_0):
            token, slot = torch.where(index == e)             return moeca_item_0(moeca_rows_0)
            y = self.experts[e](x[token])                 out = moeca.experts_fixed_k(
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
from moeca_compile.capture.expert_code import BODY, ExpertCode, NotRewritableError
from moeca_compile.capture.names import ADDS_UP, SHAPES
from moeca_compile.capture.roles import Site, base_of, spelled
from moeca_compile.capture.syntax import (
    assignment,
    compiled,
    handed,
    located,
    rebuilt,
    tuple_of,
    with_blocks,
    with_statements,
)
from moeca_compile.capture.turns import CHOSEN, WEIGHTS, Turns

EXPERTS, PAIRS = "experts", "pairs"  # methods of what `moeca` is bound to
CHOICES = frozenset({"topk", "argmax", "max", "sort", "argsort", "multinomial"})
REPLACES = frozenset({"where", "masked_fill", "masked_fill_", "index_put_", "masked_scatter_", "clamp"})
LIKE = "moeca_like"


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
    except NotRewritableError:
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


class _Rewriting(ExpertCode):
    """Replaces the dispatch, and takes out what only served it."""

    def tree(self) -> ast.FunctionDef:
        site = self.site
        body = self.body()
        call = self.call()
        self.inserted.setdefault(site.statement, []).append(body)
        replaced: dict[int, ast.expr] = {id(site.result.node): call}
        statements = self.block(site.tree.body, replaced)
        statements, _ = self.pruning.pruned(statements, set())
        if any(node in (site.product.node, site.y.node) for each in statements for node in ast.walk(each)):
            raise NotRewritableError
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
            raise NotRewritableError
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

    def target(self) -> str:
        """The local that holds the result after the loop."""
        names = [name for name, value in self.flow.after[self.site.statement].items() if value is self.site.result]
        if len(names) != 1 or names[0] not in self.names:
            raise NotRewritableError
        return names[0]

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
                    raise NotRewritableError
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
