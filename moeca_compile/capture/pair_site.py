"""Where MoE dispatch stands in which experts take tokens, so that tokens have no fixed number of experts.

It has the shape that site.py looks for, but what picks an expert's rows are numbers of tokens, chosen by a top-k
or a sort of scores, and not places at which an expert's number stands:

    y = what an expert makes of x[ids]                        also: of a gather, of one_hot(ids) @ x
    product = y * weight
    result = the products, added up at ids

Of the order in which ids and weights are kept, (experts, ids), (samples, experts, ids) and so on, the code says
little and the numbers all: idioms/pairs.py tries.
"""

from __future__ import annotations

import ast

from moeca_compile.capture.dataflow import Flow, Value
from moeca_compile.capture.names import (
    COMPARISONS,
    CONTRACTIONS,
    PICKS,
    PLACES,
    REPEATS,
    SELECTS,
    SHAPES,
    SPLITS,
    TURNS,
    VIEWS,
)
from moeca_compile.capture.roles import Item, Selection, Site, of_self, stateless
from moeca_compile.capture.site import Finder

# A loop over these goes over as many experts as the data say.
_UNKNOWN = frozenset({"nonzero", "unique", "where", "argwhere"})
_PRODUCT_OF_TWO = frozenset({"Mult", "mul", "multiply"})


def find_pair_site(flow: Flow, tree: ast.FunctionDef, items: dict[int, Item]) -> Site | None:
    """The method's one dispatch by token ids; None where there is none that is understood."""
    return PairFinder(flow, tree, lambda _: None, items, dense=False).site() if items and stateless(flow) else None


def chosen_tokens(value: Value) -> bool:
    """Whether a subscript is ids that a top-k or a sort chose, as they are or with offsets added.

    What a call of self returns beside other values, and an argument, may be such ids too.
    """
    pending = [value]
    while pending:
        value = pending.pop()
        if chooses(value) or value.kind == "parameter":
            return True
        if value.name in ("Add", "add", "Tuple", "enumerate", "zip"):
            pending.extend(value.operands)
        elif value.operands and _is_part(value):
            pending.append(value.operands[0])
    return False


def chooses(value: Value) -> bool:
    """Whether a value is a top-k, a sort, or one of the values that a call of self returns."""
    if value.kind == "call":
        return value.name in SELECTS
    source = value.operands[0] if value.name.startswith("part ") else None
    return source is not None and source.kind == "call" and bool(source.operands) and of_self(source.operands[0])


def _is_part(value: Value) -> bool:
    """Whether a value is a part or another shape of its first operand."""
    if value.kind == "call":
        return value.name in VIEWS | REPEATS | TURNS | SPLITS
    return value.kind in ("index", "element") or value.name == "indices" or value.name.startswith("part ")


def only_skips_the_empty(statement: ast.stmt) -> bool:
    """Whether all conditions in a loop ask whether an expert has any tokens: the dispatch needs none of those."""
    return all(_asks_for_any(node.test) for node in ast.walk(statement) if isinstance(node, ast.If))


def _asks_for_any(test: ast.expr) -> bool:
    if isinstance(test, ast.BoolOp):
        return all(map(_asks_for_any, test.values))
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _asks_for_any(test.operand)
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.comparators[0], ast.Constant):
        least = 1 if isinstance(test.ops[0], (ast.Lt, ast.GtE)) else 0
        return test.comparators[0].value == least
    return isinstance(test, (ast.Name, ast.Call, ast.Attribute))  # `if k`, `if mask.any()`, `if self.training`


def one_hot_of(value: Value) -> Value | None:
    """The ids whose one-hot form `value` is, through views."""
    while value.kind == "call" and value.name in VIEWS | TURNS and value.operands:
        value = value.operands[0]
    return value.operands[0] if value.kind == "call" and value.name == "one_hot" and value.operands else None


class PairFinder(Finder):
    """Finds the roles where rows are picked by token ids."""

    def site(self) -> Site | None:
        for product, weighted, factor in self.products():
            result = self.added_up(product)
            statement = self.statement_of(result) if result is not None else None
            if result is None or statement is None or not only_skips_the_empty(statement):
                continue
            self.names, y = self.flow.before[statement], self.branch(weighted)
            rows = self.rows(y)
            index = next((self.ids_of(leaf) for leaves in rows.values() for leaf in leaves), None)
            weight, selection = self.weight(product, factor), None
            if index is None or weight is None:
                selection = self.selection(product, factor, rows)
                index, weight = (selection.tokens, factor) if selection else (None, None)
            if index is not None and weight is not None:
                base = self.base_of_sum(result)
                roles = (result, product, y, rows, index, weight, self.items, True, statement, base, True, selection)
                return Site(self.flow, self.tree, *roles)
        return None

    def selection(self, product: Value, factor: Value, rows: dict[Value, list[Value]]) -> Selection | None:
        """What a turn of the one loop over experts takes, where its own code makes that."""
        loop = self.loop_of(product)
        if loop is None or any(isinstance(node, ast.For) and node is not loop for node in ast.walk(loop)):
            return None
        if any(value.name in _UNKNOWN for value in self.flow.at[loop.iter].ancestors()):
            return None
        for value in (each for leaves in rows.values() for leaf in leaves for each in self.chain(leaf)):
            subscripts = value.operands[1:] if value.kind == "index" or value.name in PICKS else ()
            for subscript in subscripts:
                if id(subscript) in self.looped and self.is_choice(subscript):
                    return Selection(subscript, factor, loop)
        return None

    def is_choice(self, subscript: Value) -> bool:
        """Whether a subscript is the tokens that a turn chose: a mask, places of one, a top-k or a sort's first."""
        if chosen_tokens(subscript):
            return True
        parts = [value for value in subscript.ancestors() if value.name.startswith("part ")]
        places = {id(part.operands[0]) for part in parts if part.operands[0].name in PLACES}
        unpacked = [v for v in self.flow.made if v.name.startswith("part ") and id(v.operands[0]) in places]
        if len(unpacked) > len(places) and subscript.name != "Tuple":
            return False  # places in more dimensions than one: slots beside tokens
        return any(value.name in COMPARISONS for value in subscript.ancestors())

    # product and sum

    def factor(self, others: list[Value]) -> Value | None:
        """The weights among a product's other operands, without the one-hot form of the ids."""
        for other in others:
            if one_hot_of(other) is not None:
                continue
            if other.name in _PRODUCT_OF_TWO and len(other.operands) == 2:
                plain = [operand for operand in other.operands if one_hot_of(operand) is None]
                return plain[0]
            return other
        return None

    def branch(self, value: Value) -> Value:
        found = super().branch(value)
        while found.kind == "call" and found.name in VIEWS | TURNS and self.is_output(found.operands[0]):
            found = super().branch(found.operands[0])
        return found

    def added_up(self, product: Value) -> Value | None:
        if self.puts_back(product):
            return product
        result = self.last_sum(product)
        return result if result is not None and result.name != "append" else None

    def adds_up(self, value: Value) -> bool:
        return super().adds_up(value) or self.puts_back(value)

    def carries(self, user: Value, current: Value, loop: ast.For | None) -> bool:
        turns = user.kind == "call" and user.name in TURNS
        return turns or self.puts_back(user) or super().carries(user, current, loop)

    def puts_back(self, value: Value) -> bool:
        """Whether a contraction with the one-hot form of the ids puts outputs back to their tokens."""
        if value.name not in CONTRACTIONS or not any(self.is_output(operand) for operand in value.operands):
            return False
        factors = [part for operand in value.operands for part in (operand, *self.factors_of(operand))]
        return any(one_hot_of(part) is not None for part in factors)

    def factors_of(self, value: Value) -> tuple[Value, ...]:
        return value.operands if value.name in _PRODUCT_OF_TWO else ()

    def base_of_sum(self, result: Value) -> Value | None:
        """What the products are added to, where that is not zeros."""
        if self.puts_back(result) or result.name == "sum" or self.from_zeros(result):
            return None
        return result.operands[0]

    # the roles

    def rows(self, y: Value) -> dict[Value, list[Value]]:
        found: dict[Value, list[Value]] = {}
        for leaf in self.leaves(y):
            found.setdefault(self.all_tokens(leaf), []).append(leaf)
        return found

    def all_tokens(self, leaf: Value) -> Value:
        """What `leaf` is rows of, without the copies for each expert that it may have been given."""
        rest = self.after_picks(self.chain(leaf))
        copies = [number for number, value in enumerate(rest) if value.kind == "call" and value.name in REPEATS]
        rest = rest[copies[-1] + 1 :] if copies else rest
        while copies and len(rest) > 1 and (rest[0].name == "unsqueeze" or self.keeps_all(rest[0])):
            rest = rest[1:]
        return next((value for value in rest if self.can_be_spelled(value)), rest[-1])

    def ids_of(self, leaf: Value) -> Value | None:
        """The token ids of all experts, of which `leaf`'s rows are picked by one expert's or by all."""
        for value in self.chain(leaf):
            if id(value) not in self.items and self.token_ids(value) is not None:
                found = self.of_all_experts(self.token_ids(value), VIEWS | REPEATS)
                return found if found is not None and chosen_tokens(found) else None
        return None

    def weight(self, product: Value, factor: Value) -> Value | None:
        return None if of_self(factor) else self.of_all_experts(factor, SHAPES | REPEATS)

    def token_ids(self, value: Value | None) -> Value | None:
        """The ids by which `value` is rows of its operand."""
        if value is None:
            return None
        if value.name in CONTRACTIONS:
            return next((ids for ids in map(one_hot_of, value.operands) if ids is not None), None)
        if value.kind == "index" or (value.kind == "call" and value.name in PICKS):
            return next((each for each in value.operands[1:] if chosen_tokens(each)), None)
        return None

    def of_all_experts(self, value: Value | None, through: frozenset[str]) -> Value | None:
        """`value` without shapes and without one turn's subscript; None if a turn of the loop made it."""
        while value is not None:
            if value.name == "Tuple":
                value = next((each for each in value.operands if chosen_tokens(each)), None)
            elif self.is_view(value, through):
                value = value.operands[0]
            else:
                break
        if value is None or id(value) in self.looped or id(value) in self.experts:
            return None
        return value

    def is_view(self, value: Value, through: frozenset[str]) -> bool:
        """Whether a value is another shape of its operand, or one turn's part of it."""
        if value.kind == "call":
            return value.name in through | {"unbind"} and bool(value.operands)
        if value.kind == "index":
            picked = self.token_ids(value) is not None and id(value) in self.looped
            return picked or self.keeps_all(value)
        return value.kind == "element"

    def keeps_all(self, value: Value) -> bool:
        """Whether a subscript takes one turn's part of all, or changes but the shape: `[:, e]`, `[..., None]`."""
        if value.kind != "index":
            return False
        subscript = value.operands[1]
        parts = subscript.operands if subscript.name == "Tuple" else (subscript,)
        return all(self.is_turn(part) or self.is_whole(part) for part in parts)

    def is_turn(self, part: Value) -> bool:
        return part.kind in ("counter", "element")

    def is_whole(self, part: Value) -> bool:
        return part.name in ("None", "Ellipsis") or (part.name == "Slice" and not part.operands)

    # from rows back to what they are rows of

    def under(self, value: Value) -> Value | None:
        if not value.operands or id(value) in self.items:
            return None
        if value.name in CONTRACTIONS and self.token_ids(value) is not None:
            return next((o for o in value.operands if one_hot_of(o) is None and o.kind != "constant"), None)
        if value.kind == "call" and value.name in TURNS:
            return value.operands[0]
        return super().under(value)

    def picks(self, value: Value) -> bool:
        if value.kind == "call" and value.name in SPLITS:
            return value.name == "unbind"
        if self.token_ids(value) is not None:
            return True
        subscripted = value.kind == "index" or (value.kind == "call" and value.name in PICKS)
        return subscripted and any(id(subscript) in self.looped for subscript in value.operands[1:])
