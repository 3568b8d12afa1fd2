"""Experts in a layer's graph: equal subgraphs, each of which reads the parameters of one expert.

What belongs to which expert is told by where its parameters come from: from the modules of a list that are built
alike, or from one parameter that is taken apart by numbers (`w[e]`, a slice, a part of `unbind`, `_grouped_mm`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeca_compile._torch_private import schema_of
from moeca_compile.capture.numerics import UntrustedError
from moeca_compile.capture.running.graph import Graph
from moeca_compile.capture.running.trace import EXCHANGE
from moeca_compile.capture.structure import structure
from moeca_compile.ops.exchange import count_of, factors

GROUPED = torch.ops.aten._grouped_mm.default
ROWS = "rows"  # in a body's code: as many as it is given
_SIZES = frozenset(
    {"size", "shape", "sizes", "end", "length", "repeats", "steps", "split_size", "split_sizes", "output_size"}
)
"""The arguments of ATen's ops that are sizes. Others may be equal to a number of rows: exponents, dims, places."""

Own = tuple[fx.Node, int | None]
"""A tensor of an expert: a node, or the part of it with this number."""

Address = tuple[Any, tuple[int, ...]]
"""(where a tensor of a layer is kept, but for the numbers in it; these numbers)."""


@dataclass(frozen=True)
class Piece:
    """One run of experts: `out` is made from `rows`; `expert` says of each row whose it is."""

    rows: fx.Node
    out: fx.Node
    expert: Tensor


@dataclass(frozen=True)
class Experts:
    """What all experts have in common and what each of them owns.

    body: of (rows, *tensors of an expert)
    own: the tensors of each expert
    group: of the ranks that hold so many experts each, where they are not all here
    places: how many rows of a rank an expert has room for, if rows come in blocks
    """

    pieces: list[Piece]
    body: fx.GraphModule
    own: list[list[Own]]
    group: str = ""
    places: int = 0

    @property
    def factors(self) -> list[float]:
        """By what the rows of each rank's experts are multiplied, there and back (ops.exchange)."""
        return factors(self.group)

    @property
    def count(self) -> int:
        """The experts of all ranks."""
        return len(self.own) * len(self.factors)


class Group:
    """Nodes that are tensors of experts, with the expert's number; `count` experts.

    others: for a tensor of an expert, that of another one, where they are modules that are built alike
    """

    def __init__(self, number_of: dict[fx.Node, int], count: int, others: _Others) -> None:
        self.number_of, self.count, self.others = number_of, count, others


def groups(graph: Graph, layer: nn.Module) -> Iterator[Group]:
    """What may be experts. An expert's number is its place in the list, or the order of its parts."""
    members = _members(layer)
    addresses = {node: _address(graph, node, members) for node in _tensors_read(graph)}
    lists: dict[Any, dict[fx.Node, int]] = defaultdict(dict)
    parts: dict[Any, dict[fx.Node, tuple[int, ...]]] = defaultdict(dict)
    for node, (family, numbers) in addresses.items():
        names = _names(family)
        of_list = {name.partition(".*.")[0] for name in names if ".*." in name}
        if len(of_list) == 1 and len(numbers) == len([name for name in names if ".*." in name]):
            lists[of_list.pop()][node] = numbers[0]
        elif numbers:
            parts[family][node] = numbers
    others = _Others(graph, members)
    for name, number_of in lists.items():
        yield Group(number_of, members.count_of[name], others)
    packed: dict[int, dict[fx.Node, int]] = defaultdict(dict)
    for found in parts.values():
        order = {key: number for number, key in enumerate(sorted(set(found.values())))}
        packed[len(order)].update({node: order[key] for node, key in found.items()})
    for count, number_of in packed.items():
        if count > 1:
            yield Group(number_of, count, others)
    single = _read_between_exchanges(graph)
    if single:
        yield Group(dict.fromkeys(single, 0), 1, others)


def _read_between_exchanges(graph: Graph) -> list[fx.Node]:
    """The layer's tensors that rows meet where they have come from other ranks: those of one expert, it may be."""
    found = [node for node in graph.nodes if is_exchange(graph, node)]
    if len(found) < 2:
        return []
    inside = graph.after(found[:1]) & set(graph.before(found[-1:]))
    return [node for node in _tensors_read(graph) if not inside.isdisjoint(node.users)]


def grouped(graph: Graph) -> dict[int, list[fx.Node]]:
    """The products by groups of rows, by how many groups there are."""
    found: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is GROUPED and node in graph.made_of_data and graph.of_state_alone(_matrices(node)):
            found[len(graph.values[_matrices(node)])].append(node)
    return found


# whose is a tensor


class _Members:
    """Modules of a list (or other container) that are built alike: their number among those."""

    def __init__(self) -> None:
        self.number: dict[str, tuple[str, int]] = {}
        self.count_of: dict[str, int] = {}


class _Others:
    """The tensors of modules that are built alike, by what they are to each other."""

    def __init__(self, graph: Graph, members: _Members) -> None:
        self.address = {node: _address(graph, node, members) for node in graph.state}
        self.at = {address: node for node, address in self.address.items()}

    def of(self, node: fx.Node, number: int) -> fx.Node | None:
        family, numbers = self.address.get(node, (None, ()))
        return self.at.get((family, (number,))) if len(numbers) == 1 else node if family and not numbers else None


def _members(layer: nn.Module) -> _Members:
    found = _Members()
    for name, module in layer.named_modules():
        alike: dict[Any, list[str]] = defaultdict(list)
        for child, held in module.named_children():
            if any(True for _ in held.parameters()):
                alike[structure(held)].append(child)
        for children in alike.values():
            if len(children) > 1:
                place = f"{name}.{children[0]}" if name else children[0]
                found.count_of[place] = len(children)
                for number, child in enumerate(children):
                    found.number[f"{name}.{child}" if name else child] = (place, number)
    return found


def _tensors_read(graph: Graph) -> list[fx.Node]:
    """The nodes made of the layer's tensors alone that are read together with data."""
    read = {each: None for node in graph.nodes if node in graph.made_of_data for each in node.all_input_nodes}
    return [node for node in read if graph.of_state_alone(node)]


def _address(graph: Graph, node: fx.Node, members: _Members) -> Address:
    if node.op == "placeholder":
        parts = graph.name_of[node].split(".")
        for end in range(1, len(parts) + 1):
            place = members.number.get(".".join(parts[:end]))
            if place is not None:
                return f"{place[0]}.*.{'.'.join(parts[end:])}", (place[1],)
        return graph.name_of[node], ()
    numbers: list[int] = []

    def generic(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            family, inner = _address(graph, arg, members)
            numbers.extend(inner)
            return family
        if isinstance(arg, (list, tuple)):
            return tuple(generic(each) for each in arg)
        if isinstance(arg, int) and not isinstance(arg, bool) and _takes_apart(node):
            numbers.append(arg)
            return "#"
        return arg

    return (str(node.target), generic(node.args), generic(tuple(sorted(node.kwargs.items())))), tuple(numbers)


def _takes_apart(node: fx.Node) -> bool:
    """Whether the result is a part of the operand: smaller, by numbers."""
    return "getitem" in str(node.target) or any(
        node.target is op
        for op in (torch.ops.aten.select.int, torch.ops.aten.slice.Tensor, torch.ops.aten.narrow.default)
    )


def _names(family: Any) -> list[str]:
    if isinstance(family, tuple):
        return [name for each in family for name in _names(each)]
    return [family] if isinstance(family, str) and ".*." in family else []


# what one expert computes


def of_group(graph: Graph, group: Group, depth: int) -> Experts | None:
    """The experts of a group, whose rows are the `depth`-th thing that their first inputs are made from."""
    needs = _numbers_needed(graph, group)
    readers: dict[int, list[fx.Node]] = defaultdict(list)
    for node in needs:
        for number in {group.number_of[each] for each in node.all_input_nodes if each in group.number_of}:
            readers[number].append(node)
    pieces: list[Piece] = []
    codes: list[_Code] = []
    own: dict[int, list[fx.Node]] = {}
    for number in sorted(readers):
        of_expert = _codes_of(graph, readers[number], needs, number, depth)
        if not of_expert:
            return None
        own[number] = of_expert[0].tensors
        codes += of_expert
        pieces += [Piece(code.rows, code.out, torch.full((code.length,), number)) for code in of_expert]
    if not own:
        return None
    for number in set(range(group.count)) - own.keys():
        own[number] = _of_idle(group, codes[0].tensors, number)
    owned: list[list[Own]] = [[(node, None) for node in own[e]] for e in range(group.count)]
    return Experts(pieces, _common_body(codes), owned, *_exchange_of(graph, pieces, group.count))


def _exchange_of(graph: Graph, pieces: list[Piece], own: int) -> tuple[str, int]:
    """The group through which the rows of experts came, and how many places an expert had there for those of a rank.

    Raises UntrustedError where it is not one for all.
    """
    rows = graph.values[pieces[0].rows]
    found = [node for node in graph.before([piece.rows for piece in pieces]) if is_exchange(graph, node)]
    groups = {str(node.args[3]) for node in found}
    if len(groups) > 1:
        raise UntrustedError("its rows are exchanged by several process groups")
    if not found:
        return "", 0
    group, sent = groups.pop(), graph.values[found[-1]].numel() // rows.shape[-1]
    return group, sent // (own * count_of(group))


def is_exchange(graph: Graph, node: fx.Node) -> bool:
    """Whether a node exchanges rows with other ranks, and not counts of these."""
    return node.target is EXCHANGE and graph.values[node].is_floating_point()


def without_idle(experts: Experts) -> Experts | None:
    """Only those that got rows: the others of a list may have another part. None where all of them did."""
    ran = torch.cat([piece.expert for piece in experts.pieces]).unique()
    if len(ran) == len(experts.own):
        return None
    pieces = [Piece(each.rows, each.out, torch.searchsorted(ran, each.expert)) for each in experts.pieces]
    return Experts(
        pieces, experts.body, [experts.own[number] for number in ran.tolist()], experts.group, experts.places
    )


def _of_idle(group: Group, tensors: list[fx.Node], number: int) -> list[fx.Node]:
    """The tensors of an expert that got no rows, as those of another one."""
    found = [group.others.of(each, number) for each in tensors]
    if None in found:
        raise UntrustedError(f"expert {number} got no rows in a random call, so nothing is known of it")
    return [each for each in found if each is not None]


def _codes_of(
    graph: Graph, readers: list[fx.Node], needs: dict[fx.Node, set[int]], number: int, depth: int
) -> list[_Code]:
    """An expert's code, as often as it runs; [] where not all that reads its tensors is in such code."""
    starts = [node for node in readers if not any(each in needs for each in node.all_input_nodes)]
    found: dict[fx.Node, _Code] = {}
    for rows in (_walked_back(graph, start, needs, depth) for start in starts):
        if rows is None:
            return []
        if rows not in found:
            inside = _inside(graph, rows, lambda node: needs.get(node, set()) <= {number})
            out = _way_out(graph, [node for node in inside if node in needs], rows)
            if out is None:
                return []
            found[rows] = _Code(graph, rows, out)
    codes = list(found.values())
    known = {node for code in codes for node in code.nodes}
    same = all(_same_tensors(graph, codes[0], code) for code in codes[1:])
    return codes if same and known.issuperset(readers) else []


def _same_tensors(graph: Graph, one: _Code, other: _Code) -> bool:
    return len(one.tensors) == len(other.tensors) and all(
        a is b or torch.equal(graph.values[a], graph.values[b])
        for a, b in zip(one.tensors, other.tensors, strict=True)
    )


def of_grouped(graph: Graph, products: list[fx.Node], depth: int) -> Experts | None:
    """The experts of products by groups of rows that lie beside each other."""
    rows = _walked_back(graph, products[0], {}, depth)
    offsets = [each for product in products for each in _offsets(product)]
    ends = [graph.values[each] for each in offsets]
    if rows is None or len(ends) != len(products) or not all(torch.equal(each, ends[0]) for each in ends):
        return None
    inside = _inside(graph, rows, lambda node: True, allowed=set(offsets))
    after = graph.after(products)
    out = _way_out(graph, [node for node in inside if node in after], rows)
    if out is None:
        return None
    code = _Code(graph, rows, out)
    packed = {_matrices(each) for each in products}
    number_of_row = torch.searchsorted(ends[0].cpu().long(), torch.arange(code.length), right=True)
    own: list[list[Own]] = [
        [(node, number if node in packed else None) for node in code.tensors] for number in range(len(ends[0]))
    ]
    pieces = [Piece(rows, out, number_of_row)]
    return Experts(pieces, _common_body([code]), own, *_exchange_of(graph, pieces, len(own)))


def _matrices(product: fx.Node) -> fx.Node:
    found = product.args[1]
    assert isinstance(found, fx.Node)
    return found


def _offsets(product: fx.Node) -> list[fx.Node]:
    """Where its groups end."""
    return [each for each in (*product.args[2:3], product.kwargs.get("offs")) if isinstance(each, fx.Node)]


def _numbers_needed(graph: Graph, group: Group) -> dict[fx.Node, set[int]]:
    """For what is made of data: the experts of the group that it is made from."""
    needs: dict[fx.Node, set[int]] = {}
    for node in graph.nodes:
        if node in graph.made_of_data:
            found = {group.number_of[each] for each in node.all_input_nodes if each in group.number_of}
            found = found.union(*(needs.get(each, ()) for each in node.all_input_nodes))
            if found:
                needs[node] = found
    return needs


def _walked_back(graph: Graph, first: fx.Node, needs: Any, depth: int) -> fx.Node | None:
    node: fx.Node | None = first
    for _ in range(depth + 1):
        assert node is not None
        node = next((each for each in node.all_input_nodes if each in graph.made_of_data), None)
        if node is None or node in needs:
            return None
    value = graph.tensor(node) if node is not None else None
    return node if value is not None and value.dim() >= 2 else None


def _inside(graph: Graph, rows: fx.Node, belongs: Any, allowed: Any = frozenset()) -> list[fx.Node]:
    """All that is made of `rows` and no other data, on this rank."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.target is EXCHANGE:
            continue
        data = [each for each in node.all_input_nodes if each in graph.made_of_data and each not in allowed]
        if data and node is not rows and all(each is rows or each in found for each in data) and belongs(node):
            found[node] = None
    return list(found)


def _way_out(graph: Graph, own: list[fx.Node], rows: fx.Node) -> fx.Node | None:
    """The one node among an expert's own that others read, as rows."""
    mine = set(own)
    outs = [node for node in own if any(user not in mine for user in node.users)]
    if len(outs) != 1:
        return None
    out: fx.Node | None = outs[0]
    count = graph.values[rows].shape[:-1]
    while out is not None:
        value = graph.tensor(out)
        if value is not None and value.dim() >= 2 and value.shape[:-1] == count:
            return out if len(count) == 1 else _before_views(graph, out, mine)
        earlier = [each for each in out.all_input_nodes if each in mine]
        out = earlier[0] if len(earlier) == 1 and len(earlier[0].users) == 1 else None
    return None


def _before_views(graph: Graph, out: fx.Node, mine: set[fx.Node]) -> fx.Node:
    """The earliest node that holds the same rows: views of blocks of rows name sizes of this call."""
    found, node, value = out, out, graph.values[out]
    while True:
        earlier = [each for each in node.all_input_nodes if each in mine]
        if len(earlier) != 1 or len(earlier[0].users) != 1:
            return found
        node, held = earlier[0], graph.tensor(earlier[0])
        if held is None or held.numel() != value.numel() or not torch.equal(held.flatten(), value.flatten()):
            return found
        if held.shape == value.shape:
            found = node


class _Code:
    """The nodes from `rows` to `out`, and the layer's tensors among what they read, in the order of reading."""

    def __init__(self, graph: Graph, rows: fx.Node, out: fx.Node) -> None:
        self.rows, self.out, self.length = rows, out, graph.values[rows].shape[:-1].numel()
        state = [node for node in graph.nodes if graph.of_state_alone(node)]
        products = [each for each in graph.before([out], [rows]) if each.target is GROUPED]
        offsets = [each for product in products for each in _offsets(product)]
        self.nodes = graph.before([out], [rows, *state, *offsets])
        read = {each: None for node in self.nodes for each in node.all_input_nodes if graph.of_state_alone(each)}
        self.tensors = list(read)

    def spelled(self) -> list[Any]:
        """The code with nodes by their place."""
        place: dict[fx.Node, Any] = {self.rows: ("node", -1)}
        place |= {node: ("node", number) for number, node in enumerate(self.nodes)}
        place |= {node: ("tensor", number) for number, node in enumerate(self.tensors)}

        def generic(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                return place.get(arg, ("other", 0))
            if isinstance(arg, (list, tuple)):
                return [generic(each) for each in arg]
            return {k: generic(v) for k, v in arg.items()} if isinstance(arg, dict) else arg

        return [[node.op, node.target, generic(list(node.args)), generic(dict(node.kwargs))] for node in self.nodes]


def _common_body(codes: list[_Code]) -> fx.GraphModule:
    """What all of them compute. Raises UntrustedError where one computes something else."""
    lengths = [code.length for code in codes]
    spelled = [code.spelled() for code in codes]
    if len({len(each) for each in spelled}) != 1:
        raise UntrustedError("one expert computes something else than another")
    common = [_common_call([each[at] for each in spelled], lengths) for at in range(len(spelled[0]))]
    return _built(common, len(codes[0].tensors))


def _common_call(calls: list[list[Any]], lengths: list[int]) -> list[Any]:
    """The call of an op that all of them make.

    Where experts have different numbers of rows, a number that differs as these do can be nothing else. Where all
    have as many, as where they choose their tokens, it may also be an exponent, a width, a dim: then it is taken for
    the number of rows only as a size in the first place, where the rows are.
    """
    op, target, args, kwargs = calls[0]
    if any([each[:2], len(each[2])] != [[op, target], len(args)] for each in calls):
        raise UntrustedError("one expert computes something else than another")
    schema = schema_of(target)
    names = [argument.name for argument in schema.arguments] if schema is not None else [""] * len(args)
    along = {**dict(zip(names, args, strict=False)), **kwargs}.get("dim", 0)

    def common(name: str, values: list[Any]) -> Any:
        if len(set(lengths)) > 1:
            return _common(values, lengths)
        if name not in _SIZES or along != 0:
            return _common(values, [])
        if isinstance(values[0], list):
            return [_common(list(each), [] if at else lengths) for at, each in enumerate(zip(*values, strict=True))]
        return _common(values, lengths)

    placed = [common(names[at], [each[2][at] for each in calls]) for at in range(len(args))]
    return [op, target, placed, {name: common(name, [each[3].get(name) for each in calls]) for name in kwargs}]


def _common(args: list[Any], lengths: list[int]) -> Any:
    first = args[0]
    if isinstance(first, int) and not isinstance(first, bool) and args == lengths:
        return ROWS, None
    if isinstance(first, list) and all(isinstance(each, list) and len(each) == len(first) for each in args):
        return [_common([each[at] for each in args], lengths) for at in range(len(first))]
    if isinstance(first, dict) and all(isinstance(each, dict) and each.keys() == first.keys() for each in args):
        return {key: _common([each[key] for each in args], lengths) for key in first}
    if any(type(each) is not type(first) or each != first for each in args):
        raise UntrustedError("one expert computes something else than another")
    return first


def _built(code: list[Any], tensors: int) -> fx.GraphModule:
    graph = fx.Graph()
    rows = graph.placeholder("rows")
    own = [graph.placeholder(f"own_{number}") for number in range(tensors)]
    count = graph.call_method("size", (rows, 0))
    made: list[fx.Node] = []

    def concrete(arg: Any) -> Any:
        if isinstance(arg, tuple):
            kind, number = arg
            if kind == ROWS:
                return count
            if kind == "tensor":
                return own[number]
            if kind == "node":
                return rows if number < 0 else made[number]
            raise UntrustedError("its experts read what is no part of them")
        if isinstance(arg, list):
            return [concrete(each) for each in arg]
        return {key: concrete(each) for key, each in arg.items()} if isinstance(arg, dict) else arg

    for op, target, args, kwargs in code:
        if op != "call_function":
            raise UntrustedError("its experts read a tensor that is neither their parameter nor their rows")
        if target is GROUPED:
            target, args, kwargs = torch.ops.aten.mm.default, args[:2], {}
        made.append(graph.call_function(target, tuple(concrete(args)), concrete(kwargs)))
    graph.output(made[-1])
    return fx.GraphModule({}, graph)
