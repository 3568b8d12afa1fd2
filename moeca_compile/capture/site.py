"""Where in a method MoE dispatch stands, and which of its values play which role.

`find_site` answers for any method, a whole `forward` with router and dispatch in one as well as a method that
is handed rows and expert ids. It looks for this shape in the data flow, whatever the statements are:

    y = what an expert makes of rows of x           (x and further per-token inputs, picked by the expert ids)
    product = y * entries of weight
    result = the products, added up over a token's branches

An idiom says how the expert ids are recognized (`index_of`) and how an expert's own parameters are (`items`).
What is found is used by rewriting.py and checked with numbers; nothing here has to be proven.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from moeca_compile.capture.dataflow import Flow, Names, Value
from moeca_compile.capture.names import (
    ADDS_UP,
    COMPARISONS,
    CONTRACTIONS,
    IN_PLACE,
    JOINS,
    PICKS,
    PRODUCTS,
    REPEATS,
    SCATTERS,
    SERIES,
    SHAPES,
    SPLITS,
    TOKENS,
    TURNS,
    VIEWS,
    ZEROS,
)
from moeca_compile.capture.roles import (
    IndexOf,
    Item,
    ItemsOf,
    Site,
    base_of,
    dependents,
    has_tensors,
    loop_items,
    nearest,
    of_self,
    spelled,
    stateless,
)


def find_site(
    flow: Flow, tree: ast.FunctionDef, index_of: IndexOf, items_of: ItemsOf = loop_items, dense: bool = False
) -> Site | None:
    """The method's one dispatch, None where there is none that is understood, or where the method keeps state.

    dense: whether the experts may run on all rows
    """
    items = items_of(flow)
    return Finder(flow, tree, index_of, items, dense).site() if items and stateless(flow) else None


class Finder:
    index: Value  # the expert ids, while one product is tried
    names: Names  # the locals where the dispatch would be replaced

    def __init__(
        self, flow: Flow, tree: ast.FunctionDef, index_of: IndexOf, items: dict[int, Item], dense: bool
    ) -> None:
        self.dense = dense
        self.unrepeated: set[int] = set()  # repeats of a token's row for each of its branches
        self.flow, self.tree, self.index_of, self.items = flow, tree, index_of, items
        self.order = {id(value): number for number, value in enumerate(flow.made)}
        self.experts = dependents(flow, lambda value: id(value) in items)
        self.after_experts = dependents(flow, lambda value: id(value) in items, by_size=True)
        self.looped = dependents(flow, lambda value: value.kind in ("counter", "element"))
        self.parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.users: dict[int, list[Value]] = {}
        for value in flow.made:
            for operand in value.operands:
                self.users.setdefault(id(operand), []).append(value)

    def site(self) -> Site | None:
        for product, weighted, factor in self.products():
            result = self.added_up(product)
            statement = self.statement_of(result) if result is not None else None
            if result is None or statement is None:
                continue
            self.names, y = self.flow.before[statement], self.branch(weighted)
            if not self.find_index(*((factor, y) if self.dense else (y, factor))):
                continue
            weight, rows = self.weight(product, factor), self.rows(y)
            if weight is not None and rows:
                return Site(
                    self.flow,
                    self.tree,
                    result,
                    product,
                    y,
                    rows,
                    self.index,
                    weight,
                    self.items,
                    self.dense,
                    statement,
                )
        return None

    # the product of an expert's output and its weight

    def products(self) -> Iterator[tuple[Value, Value, Value]]:
        """(product, y, factor): those in the loop from the last, then those after it from the first."""
        last_use = max((self.order[id(v)] for v in self.flow.made if self.uses_item(v)), default=-1)
        found = []
        for value in self.flow.made[last_use + 1 :]:
            if value.name in PRODUCTS and value.kind in ("call", "operation"):
                own = [operand for operand in value.operands if self.is_output(operand)]
                other = [o for o in value.operands if id(o) not in self.experts and o.kind != "constant"]
                factor = self.factor(other)
                if len(own) == 1 and factor is not None:
                    found.append((value, own[0], factor))
        yield from (each for each in reversed(found) if self.loop_of(each[0]) is not None)
        yield from (each for each in found if self.loop_of(each[0]) is None)

    def factor(self, others: list[Value]) -> Value | None:
        """Which of a product's other operands holds the weights."""
        return others[0] if others else None

    def uses_item(self, value: Value) -> bool:
        return not self.is_item(value) and any(self.is_item(operand) for operand in value.operands)

    def is_item(self, value: Value) -> bool:
        """Whether a value is an expert's parameter or module itself, or a view of one."""
        while id(value) not in self.items:
            view = value.kind in ("attribute", "index") or (value.kind == "call" and value.name in VIEWS | TURNS)
            if not view or not value.operands or any(id(o) in self.experts for o in value.operands[1:]):
                return False
            value = value.operands[0]
        return True

    def is_output(self, value: Value) -> bool:
        return id(value) in self.experts and not self.is_item(value)

    def branch(self, value: Value) -> Value:
        """The output of one expert, of which `value` holds all: before the outputs were put side by side."""
        found = value
        while True:
            own = [operand for operand in value.operands if self.is_output(operand) and operand.name not in ZEROS]
            picked = value.kind == "index" and has_tensors(value.operands[1])
            if value.kind == "call" and value.name in VIEWS and own:
                value = value.operands[0]
            elif own and (value.name in JOINS | IN_PLACE | SERIES or picked):
                found = value = own[-1]
            else:
                break
        while found.kind == "call" and found.name in SHAPES and self.is_output(found.operands[0]):
            found = found.operands[0]
        return found

    # the sum over a token's branches

    def added_up(self, product: Value) -> Value | None:
        """The sum that `product` ends in; `product` itself if nothing is added (one branch a token)."""
        if product.name in CONTRACTIONS:
            return product  # contracts the experts' dimension by itself
        result = self.last_sum(product)
        if result is None:
            return product if self.loop_of(product) is None else None
        whole = result.name == "sum" or result.name in IN_PLACE - {"append"} or self.from_zeros(result)
        return result if whole else None

    def last_sum(self, product: Value) -> Value | None:
        """The last of the sums and writes that `product` goes through before the model's own code, if any."""
        result, current, loop = None, product, self.loop_of(product)
        while True:
            following = [user for user in self.users.get(id(current), []) if self.carries(user, current, loop)]
            if not following:
                return result
            current = following[-1]
            after_loop = self.loop_of(current) is None
            if loop is not None and after_loop and result is not None and result.name not in IN_PLACE | JOINS:
                return result  # added up in the loop: what follows is the model's own
            if self.adds_up(current) or current.name in IN_PLACE:
                result = current
            if self.adds_up(current) and after_loop:
                return result

    def adds_up(self, value: Value) -> bool:
        return value.name in ADDS_UP

    def carries(self, user: Value, current: Value, loop: ast.For | None) -> bool:
        if user.name == "Add":
            return loop is not None and self.loop_of(user) is loop
        if user.kind == "operation":
            return user.name in JOINS | SERIES
        if user.kind == "index":
            return user.operands[0] is current
        return user.kind == "call" and user.name in VIEWS | ADDS_UP | IN_PLACE | JOINS

    def from_zeros(self, result: Value) -> bool:
        """Whether an accumulation starts from zeros, so that nothing else is in its result."""
        base = result.operands[0]
        while base.kind == "call" and base.name in VIEWS | ADDS_UP and base.operands:
            base = base.operands[0]
        return (base.kind == "call" and base.name in ZEROS) or base.name in ("0", "0.0")

    def statement_of(self, result: Value) -> ast.stmt | None:
        """The outermost loop that `result` is made in, or the statement."""
        node = result.node
        while node is not None and not isinstance(node, ast.stmt):
            node = self.parent.get(node)
        return self.loop_of(result) or node

    def loop_of(self, value: Value) -> ast.For | None:
        node, loop = value.node, None
        while node is not None:
            loop = node if isinstance(node, ast.For) else loop
            node = self.parent.get(node)
        return loop

    # the roles

    def find_index(self, *starts: Value) -> bool:
        found = None
        for start in starts:
            found = found if found is not None else nearest(start, self.index_of)
        if found is None:
            return False
        self.index = found
        self.index = self.of_branches(self.chain(found))
        return True

    def weight(self, product: Value, factor: Value) -> Value | None:
        """The weights for all tokens, of which `factor` holds one expert's or one branch's."""
        chains = list(self.weights_in(factor))
        if self.loop_of(product) is not None and id(factor) not in self.looped:
            return None  # the same for all experts
        if len({id(chain[-1]) for chain in chains}) != 1:
            return None
        found = self.of_branches(chains[0])
        scattered = found.kind == "call" and found.name in SCATTERS and len(found.operands) == 4
        if scattered and found.operands[3].kind != "constant" and self.from_zeros(found):
            return self.of_branches(self.chain(found.operands[3]))
        return found

    def weights_in(self, value: Value) -> Iterator[list[Value]]:
        chain = self.chain(value)
        end = chain[-1]
        if of_self(end) or end.name in COMPARISONS or not has_tensors(end):
            return
        if id(end) not in self.looped:
            if base_of(end) is not base_of(self.index):
                yield chain
        elif end.name in ("Mult", "mul", "multiply", "sum", "where", "masked_fill"):
            for operand in end.operands:
                yield from self.weights_in(operand)

    def rows(self, y: Value) -> dict[Value, list[Value]]:
        """base -> values that are its rows, in the order in which the experts' code meets them."""
        found: dict[Value, list[Value]] = {}
        for leaf in self.leaves(y):
            chain = self.chain(leaf)
            found.setdefault(self.of_branches(chain) if self.dense else self.named(chain), []).append(leaf)
        return found

    def leaves(self, y: Value) -> list[Value]:
        """The values that are rows and enter the code that makes `y`."""
        leaves: dict[Value, None] = {}
        seen, pending = {id(y)}, [y]
        while pending:
            value = pending.pop()
            enters = self.uses_item(value)
            for operand in value.operands:
                if id(operand) in seen:
                    continue
                seen.add(id(operand))
                if id(operand) not in self.experts and self.is_rows(operand, enters):
                    leaves[operand] = None
                elif operand.kind in ("call", "operation"):
                    pending.append(operand)
        return sorted(leaves, key=lambda each: self.order[id(each)])

    def is_rows(self, value: Value, enters_expert: bool) -> bool:
        """Whether `value` is rows of a tensor with all tokens: picked for an expert, or all of them."""
        chain = self.chain(value)
        if of_self(chain[-1]) or chain[-1].kind in ("constant", "global", "self", "counter"):
            return False
        if self.picked(chain):
            return True
        return (
            self.dense
            and enters_expert
            and id(value) not in self.looped
            and value.name not in ("Tuple", "List", "Slice")
        )

    # from rows back to what they are rows of

    def chain(self, value: Value) -> list[Value]:
        """`value`, then what it is a view of, or rows of, down to what is neither."""
        found, repeated = [value], self.dense
        while True:
            last = found[-1]
            if last.kind == "index" and self.picks(last):
                repeated = not any(each.name in TOKENS for each in self.down_to_ids(last.operands[1]))
            if last.kind == "call" and last.name in REPEATS and repeated:
                self.unrepeated.add(id(last))  # one row a branch, made of one a token
            following = self.under(last)
            if following is None:
                return found
            found.append(following)

    def down_to_ids(self, value: Value) -> Iterator[Value]:
        """What a subscript is made from, down to the expert ids."""
        pending = [value]
        while pending:
            value = pending.pop()
            yield value
            if self.index_of(value) is None:
                pending.extend(value.operands)

    def under(self, value: Value) -> Value | None:
        if not value.operands or id(value) in self.items:
            return None
        if value.kind == "element" or value.name.startswith("part "):
            inner = value.operands[0]
            return inner if self.under(inner) is not None else None
        if value.kind == "index":
            plain = not has_tensors(value.operands[1])
            return value.operands[0] if plain or self.picks(value) else None
        if value.kind == "call" and value.name in PICKS:
            return value.operands[0] if self.picks(value) else None
        if value.kind == "call" and value.name in VIEWS | REPEATS | SPLITS:
            return value.operands[0]
        return None

    def picks(self, value: Value) -> bool:
        """Whether a value is rows of its first operand, picked by the expert ids or by a loop over experts."""
        if id(value) in self.unrepeated:
            return True
        if value.kind == "call" and value.name in SPLITS:
            return value.name not in ("chunk", "unbind")
        if value.kind != "index" and not (value.kind == "call" and value.name in PICKS):
            return False
        for subscript in value.operands[1:]:
            by_ids = nearest(subscript, self.index_of)
            if id(subscript) in self.looped or (by_ids is not None and base_of(by_ids) is base_of(self.index)):
                return True
        return False

    def picked(self, chain: list[Value]) -> bool:
        return any(self.picks(value) for value in chain)

    def after_picks(self, chain: list[Value]) -> list[Value]:
        picked = [number for number, value in enumerate(chain) if self.picks(value)]
        return chain[picked[-1] + 1 :] if picked else chain

    def named(self, chain: list[Value]) -> Value:
        """The role that a chain leads to: after its last pick, the first value that is a local or is spelled."""
        rest = self.after_picks(chain)
        return next((value for value in rest if self.can_be_spelled(value)), rest[-1])

    def of_branches(self, chain: list[Value]) -> Value:
        """The same for ids and weights, whose shape does not matter: a local rather than a view of it."""
        for value in self.after_picks(chain):
            if spelled(value, self.names):
                return value
            if value.kind == "call" and value.name not in SHAPES:
                break  # it may be another type
        return self.named(chain)

    def can_be_spelled(self, value: Value) -> bool:
        """Whether `value` is a local, or its syntax can be put before the dispatch."""
        before = value.node is not None and id(value) not in self.after_experts
        return spelled(value, self.names) is not None or (before and id(value) not in self.looped)
