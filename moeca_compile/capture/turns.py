"""The loop over experts once more, for what each turn chooses of all tokens.

    for e in range(self.num_experts):                         moeca_chosen, moeca_weights = [], []
        k = int((capacity[:, e] > self.limit[e]).sum())       for e in range(self.num_experts):
        gate, token = scores[:, e].topk(k)                        k = moeca.number((capacity[:, e] > ...).sum())
        y = self.experts[e](x[token])                             gate, token = moeca.top(scores[:, e], k)
        out[token] += gate[:, None] * y                           moeca_chosen.append(token)
                                                                  moeca_weights.append(gate[:, None])

Each expression is read densely: what the original has for the chosen tokens stands there for all of them, in their
own order, and the choice itself becomes a mask or a rank under a count (idioms/choices.py). So no host is asked.
"""

from __future__ import annotations

import ast

from moeca_compile.capture.dataflow import Value
from moeca_compile.capture.names import HOST_READS, PICKS, PLACES, SELECTS, VIEWS
from moeca_compile.capture.pruning import Pruning
from moeca_compile.capture.roles import Site, spelled
from moeca_compile.capture.syntax import assignment, handed, located, rebuilt, roots, simple_statements, tuple_of

CHOSEN, WEIGHTS = "moeca_chosen", "moeca_weights"


class Turns:
    """The loop of a site with a selection; `reads` are what stands for the host's reads, by the syntax node's id."""

    def __init__(self, site: Site, pruning: Pruning) -> None:
        assert site.selection is not None
        self.site, self.flow, self.pruning, self.selection = site, site.flow, pruning, site.selection
        self.parent = {child: node for node in ast.walk(site.tree) for child in ast.iter_child_nodes(node)}
        self.sources = {self.spelling(each): each.node for each in self.sources_of(self.selection.tokens)}
        made_from = [*self.selection.tokens.ancestors(), *self.selection.factor.ancestors()]
        self.reads: dict[int, ast.expr] = {}
        for value in sorted(made_from, key=self.depth):  # the inner ones first
            read = self.on_device(value)
            if read is not None:
                self.reads[id(value.node)] = read

    def on_device(self, value: Value) -> ast.expr | None:
        """What stands for a number that the host reads, or for the larger or smaller of such numbers."""
        if value.kind != "call" or not isinstance(value.node, ast.Call):
            return None
        if value.name in HOST_READS:
            return handed("number", [rebuilt(self.subject(value.node), self.dense)])
        builtin = isinstance(value.node.func, ast.Name) and value.name in ("max", "min") and len(value.node.args) == 2
        return handed(value.name, [rebuilt(each, self.dense) for each in value.node.args]) if builtin else None

    def depth(self, value: Value) -> int:
        return sum(1 for _ in value.ancestors())

    def loop(self) -> list[ast.stmt] | None:
        """The statements that make both lists; None where an expression cannot be found any more."""
        loop = self.selection.loop
        statement: ast.AST | None = self.site.product.node
        while statement is not None and not isinstance(statement, ast.stmt):
            statement = self.parent.get(statement)
        if not isinstance(statement, ast.stmt):
            return None
        simple = list(simple_statements(loop.body))
        before = simple[: simple.index(statement)]
        names = self.flow.before[statement]
        made: list[ast.stmt] = []
        tokens = self.selection.tokens
        if tokens.name == "Tuple":  # x[token, :], x[sample, place]
            tokens = next(part for part in tokens.operands if self.is_choice(part))
        for target, value in ((CHOSEN, tokens), (WEIGHTS, self.selection.factor)):
            name = spelled(value, names)
            node = ast.Name(name, ast.Load()) if name else value.node
            if not isinstance(node, ast.expr):
                return None
            dense = node if name else rebuilt(node, self.dense)
            append = ast.Attribute(ast.Name(target, ast.Load()), "append", ast.Load())
            made.append(located(ast.Expr(ast.Call(append, [dense], []))))
        kept, _ = self.pruning.pruned([*(rebuilt(each, self.dense) for each in before), *made], {CHOSEN, WEIGHTS})
        again = ast.For(loop.target, rebuilt(loop.iter, self.dense), kept, [], None)
        lists = [assignment(name, ast.List([], ast.Load())) for name in (CHOSEN, WEIGHTS)]
        return [*lists, ast.copy_location(again, loop)]

    # reading densely

    def dense(self, node: ast.AST) -> ast.expr | None:
        """What stands for an expression of the chosen tokens; None where it stays, or its parts tell."""
        if id(node) in self.reads:
            return self.reads[id(node)]
        value = self.flow.at.get(node) if isinstance(node, ast.expr) else None
        if value is None or (isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)):
            return None
        if isinstance(node, ast.Call):
            return self.dense_call(node, value)
        return self.dense_subscript(node, value) if isinstance(node, ast.Subscript) else None

    def dense_call(self, node: ast.Call, value: Value) -> ast.expr | None:
        if value.kind != "call":
            return None
        if self.is_source(value) and value.name in PLACES:
            return handed("places", [rebuilt(self.subject(node), self.dense), ast.Constant(value.name == "where")])
        if self.is_source(value) and value.name == "topk":
            call = handed("top", [rebuilt(each, self.dense) for each in [self.subject(node), *self.others(node)]])
            call.keywords = [rebuilt(each, self.dense) for each in node.keywords if each.arg != "sorted"]
            return call
        if value.name in PICKS and any(self.is_choice(each) for each in value.operands[1:]):
            picked: ast.expr = rebuilt(self.subject(node), self.dense)
            return picked
        return None

    def dense_subscript(self, node: ast.Subscript, value: Value) -> ast.expr | None:
        if value.kind != "index":
            return None
        if _is_first(node):
            return self.dense_first(node, value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        chosen = [self.is_choice(self.flow.at[part]) if part in self.flow.at else False for part in parts]
        if not any(chosen):
            return None
        base: ast.expr = rebuilt(node.value, self.dense)
        if all(chosen):
            return base
        whole = [
            ast.Slice() if is_one else rebuilt(part, self.dense) for part, is_one in zip(parts, chosen, strict=True)
        ]
        return ast.Subscript(base, tuple_of(whole), ast.Load())

    def dense_first(self, node: ast.Subscript, value: Value) -> ast.expr | None:
        """`order[:k, e]`, the first of a sort, or as many of the sorted values."""
        sort = next((each for each in value.ancestors() if each.kind == "call" and each.name in SELECTS), None)
        if sort is None:
            return None
        column, count = _without_cut(node)
        column, count = rebuilt(column, self.dense), rebuilt(count, self.dense)
        if self.is_source(value):
            return handed("first", [column, count])
        order = next(
            (each for each in self.sources.values() if isinstance(each, ast.Subscript) and _is_first(each)), None
        )
        if order is None or sort.name != "sort":
            return None
        return handed("placed", [column, rebuilt(_without_cut(order)[0], self.dense)])

    def subject(self, node: ast.AST | None) -> ast.expr:
        """What a call is about: its receiver, or its first argument."""
        assert isinstance(node, ast.Call)
        if isinstance(node.func, ast.Attribute) and next(roots(self.flow.at[node.func.value])).kind != "global":
            return node.func.value
        return node.args[0]

    def others(self, node: ast.Call) -> list[ast.expr]:
        return node.args[1:] if node.args and self.subject(node) is node.args[0] else node.args

    # what is the choice

    def is_choice(self, value: Value) -> bool:
        return any(self.is_source(each) for each in self.sources_of(value))

    def is_source(self, value: Value) -> bool:
        return self.spelling(value) in self.sources

    def sources_of(self, value: Value) -> list[Value]:
        """The call or the mask that chose, of which `value` is a part or another shape."""
        while True:
            if value.name == "Tuple":
                return [source for part in value.operands for source in self.sources_of(part) if source.operands]
            if not self.is_part(value):
                return [value]
            value = value.operands[0]

    def is_part(self, value: Value) -> bool:
        """Whether a value is another shape of its operand, or a part of what an op that chooses returned."""
        if value.kind == "index":
            cut = isinstance(value.node, ast.Subscript) and _is_first(value.node)
            return not cut and self.under_places(value)
        shaped = value.kind == "call" and value.name in VIEWS and bool(value.operands)
        return shaped or value.name.startswith("part ") or value.name == "indices"

    def under_places(self, value: Value) -> bool:
        """Whether a subscript takes the only dimension of places, or the ids of a top-k."""
        base = value.operands[0]
        while base.kind == "call" and base.name in VIEWS:
            base = base.operands[0]
        return base.kind == "call" and base.name in PLACES | {"topk"}

    def spelling(self, value: Value) -> str:
        return ast.unparse(value.node) if isinstance(value.node, ast.expr) else f"value {id(value)}"


def _is_first(node: ast.Subscript) -> bool:
    """Whether a subscript has one part `:k`, and no other slices than whole ones."""
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    return sum(isinstance(part, ast.Slice) and part.upper is not None and part.lower is None for part in parts) == 1


def _without_cut(node: ast.Subscript) -> tuple[ast.expr, ast.expr]:
    """(the subscript with `:k` made whole, k)."""
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    cut = next(part for part in parts if isinstance(part, ast.Slice) and part.upper is not None)
    assert isinstance(cut, ast.Slice) and cut.upper is not None
    whole = [ast.Slice() if part is cut else part for part in parts]
    column: ast.expr = ast.Subscript(node.value, tuple_of(whole), ast.Load())
    return (node.value if len(whole) == 1 else column), cut.upper
