"""At which batch sizes the rewrite of a model's graph has passed validation.

A graph that differs from two that passed in the batch size alone is the same function of it, and is not validated
once more: every number in it, and in what was matched, must be the same multiple of the size. One size would not
do: a batch that is as large as something else by chance, such as the number of heads, can hide what was mistaken.
Other sizes do not count: what a recipe does may depend on whether the tokens form a square.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

from torch import Tensor, fx

from moeca_compile.disk.form import Form
from moeca_compile.disk.keys import RewriteFacts, digest, modes
from moeca_compile.lower.sizes import Family, Numbers, Term
from moeca_compile.passes.analysis.graph import placeholders


class SizedGraph(NamedTuple):
    """A graph with its regions, at one set of shapes.

    Attributes:
        key: of all but the whole numbers.
        numbers: these.
        samples: the places among them of the first sizes of inputs; rest: of their other sizes.
    """

    key: str
    numbers: Numbers
    samples: tuple[int, ...]
    rest: tuple[int, ...]


class PassedSizes:
    """The graphs of one model that passed."""

    def __init__(self) -> None:
        self._numbers: dict[str, list[Numbers]] = {}

    def note(self, graph: SizedGraph | None) -> None:
        """This graph has passed."""
        known = self._numbers.setdefault(graph.key, []) if graph is not None else []
        if graph is not None and graph.numbers not in known:
            known.append(graph.numbers)

    def cover(self, graph: SizedGraph | None) -> bool:
        """Whether two graphs that passed differ from this one in the batch size alone."""
        known = self._numbers.get(graph.key, []) if graph is not None else []
        return graph is not None and any(_are_one(*pair, graph) for pair in combinations(known, 2))


def _are_one(one: Numbers, other: Numbers, graph: SizedGraph) -> bool:
    """Whether a graph and two with these numbers differ in the number of samples alone."""
    family = Family.of(one).with_another(other) if len(one) == len(other) == len(graph.numbers) else None
    if family is None or family.sizes(graph.numbers) is None:
        return False
    terms = family.terms
    return Term(1, (0,)) in (terms[at] for at in graph.samples) and not any(terms[at].sizes for at in graph.rest)


def sized_graph(facts: RewriteFacts | None, module: fx.GraphModule, inputs: Sequence[Any]) -> SizedGraph | None:
    """A normalized graph with what was matched in it; None where there are no facts of it."""
    if facts is None:
        return None
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    (lines, values), *more = facts.graph
    left = _Numbers(_used(module.graph))
    nodes = [
        [*left.without(line), left.without(values[place])]
        for (*line, place), node in zip(lines, module.graph.nodes, strict=True)
        if node in left.position
    ]
    others = [v for v, node in zip(inputs, placeholders(module.graph), strict=True) if node in left.position]
    others = [v if type(v) is int else repr(v) for v in others if not isinstance(v, Tensor)]
    kinds = [[str(value.dtype), str(value.device), value.dim()] for value in tensors]
    key = digest(nodes, left.without([more, others]), kinds, facts.weights, modes())
    samples, rest = list[int](), list[int]()
    for tensor in tensors:
        first, *others = range(len(left.found), len(left.found) + max(1, tensor.dim()))
        samples += [first][: tensor.dim()]
        rest += others
        left.found += [*tensor.size(), *tensor.stride()]
    return SizedGraph(key, tuple(left.found), tuple(samples), tuple(rest))


def _used(graph: fx.Graph) -> list[fx.Node | None]:
    """The nodes of a graph, None in place of a number that nothing reads: Dynamo gives the size of a batch so."""
    return [
        None if node.op == "placeholder" and not node.users and not isinstance(node.meta.get("val"), Tensor) else node
        for node in graph.nodes
    ]


class _Numbers:
    """Takes the whole numbers out of forms.

    Attributes:
        found: these, in order.
        position: the nodes that count, with their places among each other.
    """

    def __init__(self, nodes: Sequence[fx.Node | None]) -> None:
        self.found: list[int] = []
        self.nodes = nodes
        self.position = {node: i for i, node in enumerate(node for node in nodes if node is not None)}

    def without(self, form: Form) -> Any:
        """A form without its whole numbers."""
        if type(form) is int:
            self.found.append(form)
            return "#"
        if isinstance(form, (list, tuple)):
            return [self.without(each) for each in form]
        if isinstance(form, dict):
            if form.keys() == {"node"}:
                node = self.nodes[form["node"]]
                return f"%{self.position[node] if node is not None else None}"
            return {name: self.without(each) for name, each in form.items()}
        return form
