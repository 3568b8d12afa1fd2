"""Where in a method MoE dispatch stands, and which of its values play which role.

`find_site` answers for any method, a whole `forward` with router and dispatch in one as well as a method that
is handed rows and expert ids. It looks for this shape in the data flow, whatever the statements are:

    y = what an expert makes of rows of x           (x and further per-token inputs, picked by the expert ids)
    product = y * entries of weight
    result = the products, added up over a token's branches

An idiom says how the expert ids are recognised (`index_of`) and how an expert's own parameters are (`items`).
What is found is used by rewriting.py and checked with numbers; nothing here has to be proven.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moeca_compile.capture.dataflow import CALLS_SELF, OPTIONAL_ARGUMENTS, Flow, Names, Value

SHAPES = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unsqueeze",
        "squeeze",
        "contiguous",
        "expand",
        "expand_as",
        "view_as",
        "reshape_as",
        "unflatten",
    ]
)
VIEWS = SHAPES | frozenset(
    ["to", "type", "type_as", "float", "half", "bfloat16", "double", "long", "int", "clone", "detach"]
)
REPEATS = frozenset({"repeat_interleave", "repeat", "expand"})
PICKS = frozenset({"index_select", "gather", "take_along_dim"})
SPLITS = frozenset({"split", "tensor_split", "split_with_sizes", "chunk", "unbind"})
TURNS = frozenset({"transpose", "t", "permute", "swapaxes"})
CONTRACTIONS = frozenset({"MatMult", "einsum", "bmm", "matmul"})
PRODUCTS = CONTRACTIONS | {"Mult", "mul", "mul_", "multiply"}
COMPARISONS = frozenset({"Eq", "eq", "NotEq", "ne", "Gt", "gt", "Lt", "lt", "GtE", "LtE"})
ADDS_UP = frozenset(
    ["Add", "sum", "scatter_reduce_", "scatter_reduce", "scatter_add_", "scatter_add", "index_add_", "index_add"]
)
IN_PLACE = frozenset(
    [
        "index_put_",
        "index_put",
        "index_copy_",
        "index_copy",
        "scatter_",
        "scatter",
        "masked_scatter",
        "masked_scatter_",
        "append",
    ]
)
JOINS = frozenset({"cat", "concat", "stack", "vstack", "IfExp"})
SERIES = frozenset({"List", "Tuple", "ListComp", "GeneratorExp"})
SIZES = frozenset({"shape", "dtype", "device", "ndim", "size", "dim", "numel", "len", "stride"})
ZEROS = frozenset({"zeros_like", "new_zeros", "zeros"})

# In a subscript they tell that it holds numbers of tokens, not of branches.
TOKENS = frozenset({"FloorDiv", "div", "floor_divide", "where", "nonzero", "any"})

IndexOf = Callable[[Value], "Value | None"]
"""The expert ids, if a value is the one that an idiom recognises them by: the argument of a one_hot, a sort."""

ItemsOf = Callable[[Flow], "dict[int, Item]"]


@dataclass(frozen=True)
class Item:
    """A value that belongs to one expert: element e of an attribute of self.

    source: that attribute, as a value
    gathered: the subscript, where it is the expert ids of many branches and not one expert's number
    grouped: whether the value is the whole attribute, which an op takes apart by itself
    """

    source: Value
    gathered: Value | None = None
    grouped: bool = False


@dataclass(frozen=True)
class Site:
    """One dispatch.

    result: what the marker op replaces; y: an expert's output, before its weight
    rows: base -> the values that are its rows, for x and each further per-token input
    index, weight: the expert ids and the weights, for all tokens
    items: by id of a value, the experts' own
    whole_rows: whether rows keep their views in the experts' code, where they are of all tokens
    statement: the statement that is replaced, or that holds the expression `result`
    """

    flow: Flow
    tree: ast.FunctionDef
    result: Value
    product: Value
    y: Value
    rows: dict[Value, list[Value]]
    index: Value
    weight: Value
    items: dict[int, Item]
    whole_rows: bool
    statement: ast.stmt


def loop_items(flow: Flow) -> dict[int, Item]:
    """`self.a[e]` with e from a loop, and the elements of `self.a` that a loop goes through."""
    looped = dependents(flow, lambda value: value.kind in ("counter", "element"))
    found: dict[int, Item] = {}
    for value in flow.made:
        if (value.kind == "element" and of_self(value.operands[0])) or (
            value.kind == "index" and of_self(value.operands[0]) and id(value.operands[1]) in looped
        ):
            found[id(value)] = Item(value.operands[0])
    return found


def of_self(value: Value) -> bool:
    """Whether a value is an attribute of self, or of an attribute of self."""
    while value.kind == "attribute":
        value = value.operands[0]
        if value.kind == "self":
            return True
    return False


def dependents(flow: Flow, seed: Callable[[Value], bool], by_size: bool = False) -> set[int]:
    """The ids of all values made from one that `seed` holds for; from its sizes or dtype alone if `by_size`."""
    found: set[int] = set()
    for value in flow.made:
        cut = not by_size and value.name in SIZES and value.kind in ("attribute", "call")
        if seed(value) or (not cut and any(id(operand) in found for operand in value.operands)):
            found.add(id(value))
    return found


def nearest(start: Value, found_in: IndexOf) -> Value | None:
    """What `found_in` finds in the values that `start` is made from, the nearest first."""
    seen, pending = {id(start)}, [start]
    while pending:
        value = pending.pop(0)
        found = found_in(value)
        if found is not None:
            return found
        new = [operand for operand in value.operands if id(operand) not in seen]
        seen.update(map(id, new))
        pending.extend(new)
    return None


def base_of(value: Value) -> Value:
    """`value` without views, conversions and constant subscripts."""
    while (value.kind == "call" and value.name in VIEWS | REPEATS and value.operands) or (
        value.kind == "index" and not has_tensors(value.operands[1])
    ):
        value = value.operands[0]
    return value


def has_tensors(subscript: Value) -> bool:
    """Whether a subscript holds more than constants and modules of Python, e.g. not so in [:, None]."""
    return any(value.kind not in ("constant", "operation", "global", "self") for value in subscript.ancestors())


def find_site(
    flow: Flow, tree: ast.FunctionDef, index_of: IndexOf, items_of: ItemsOf = loop_items, dense: bool = False
) -> Site | None:
    """The method's one dispatch, None where there is none that is understood, or where the method keeps state.

    dense: whether the experts may run on all rows
    """
    items = items_of(flow)
    stateless = all(problem.what in (CALLS_SELF, OPTIONAL_ARGUMENTS) for problem in flow.problems)
    return _Finder(flow, tree, index_of, items, dense).site() if items and stateless else None


class _Finder:
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
                if len(own) == 1 and len(other) >= 1:
                    found.append((value, own[0], other[0]))
        yield from (each for each in reversed(found) if self.loop_of(each[0]) is not None)
        yield from (each for each in found if self.loop_of(each[0]) is None)

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
            own = [operand for operand in value.operands if self.is_output(operand)]
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
        result, current, loop = None, product, self.loop_of(product)
        while True:
            following = [user for user in self.users.get(id(current), []) if self.carries(user, current, loop)]
            if not following:
                break
            current = following[-1]
            after_loop = self.loop_of(current) is None
            if loop is not None and after_loop and result is not None and result.name not in IN_PLACE | JOINS:
                break  # added up in the loop: what follows is the model's own
            if current.name in ADDS_UP | IN_PLACE:
                result = current
            if current.name in ADDS_UP and after_loop:
                break
        if result is None:
            return product if loop is None else None
        whole = result.name == "sum" or result.name in IN_PLACE - {"append"} or self.from_zeros(result)
        return result if whole else None

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
        scattered = found.kind == "call" and found.name in ("scatter", "scatter_") and len(found.operands) == 4
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
        found: dict[Value, list[Value]] = {}
        for leaf in sorted(leaves, key=lambda each: self.order[id(each)]):
            chain = self.chain(leaf)
            found.setdefault(self.of_branches(chain) if self.dense else self.named(chain), []).append(leaf)
        return found

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


def spelled(value: Value, names: Names) -> str | None:
    """A local name that stands for `value`, if there is one."""
    return next((name for name, bound in names.items() if bound is value), None)
