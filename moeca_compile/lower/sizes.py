"""Graphs that differ in sizes alone: the size of a batch, or how many tokens a step recomputes.

Two graphs of the same ops in which every number that differs is the same multiple of one size are one graph of that
size. Whether this holds at a third size is seen by its own numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

_SMALLEST = 2
"""Sizes of 1 broadcast, and stay graphs of their own."""

Numbers = tuple[int, ...]


class Term(NamedTuple):
    """A number in a graph: a factor times a product of sizes, given by their indices."""

    factor: int
    sizes: tuple[int, ...] = ()

    def at(self, sizes: Sequence[Any]) -> Any:
        return reduce(operator.mul, (sizes[i] for i in self.sizes), self.factor)


class Family(NamedTuple):
    """Graphs of the same ops, whose numbers are these terms of some sizes.

    Attributes:
        terms: one for each number.
        places: for each size, the place of a number that is a product of it and of sizes before it.
    """

    terms: tuple[Term, ...]
    places: tuple[int, ...] = ()

    @staticmethod
    def of(numbers: Numbers) -> Family:
        """The family of one graph."""
        return Family(tuple(map(Term, numbers)))

    def sizes(self, numbers: Numbers) -> Numbers | None:
        """The sizes at which the terms are these numbers; None if there are none."""
        found = self._sizes(numbers)
        same = all(number == term.at(found) for number, term in zip(numbers, self.terms, strict=True))
        return tuple(found) if same and min(found, default=_SMALLEST) >= _SMALLEST else None

    def with_another(self, numbers: Numbers) -> Family | None:
        """The family with one more size, by which these numbers belong to it; None if there is none."""
        others = self._sizes(numbers)
        divisors = [prod(others[i] for i in term.sizes) for term in self.terms]
        if not all(divisors) or any(n % divisor for n, divisor in zip(numbers, divisors, strict=True)):
            return None
        factors = [n // divisor for n, divisor in zip(numbers, divisors, strict=True)]
        pairs = [(term.factor, factor) for term, factor in zip(self.terms, factors, strict=True)]
        varying = [(pair, place) for place, pair in enumerate(pairs) if pair[0] != pair[1]]
        if not varying:
            return None
        (one, other), place = min(varying)
        if min(one, other) < _SMALLEST or any(a % one or a * other != b * one for (a, b), _ in varying):
            return None
        varies, size = {at for _, at in varying}, len(self.places)
        terms = [
            Term(term.factor // one, (*term.sizes, size)) if at in varies else term
            for at, term in enumerate(self.terms)
        ]
        return Family(tuple(terms), (*self.places, place))

    def _sizes(self, numbers: Numbers) -> list[int]:
        """The sizes by the numbers at their places, which need not be on the terms."""
        found: list[int] = []
        for place in self.places:
            others = prod(found[i] for i in self.terms[place].sizes if i < len(found))
            found.append(numbers[place] // others if others else 0)
        return found


def without_sizes(module: fx.GraphModule, examples: Sequence[Tensor]) -> tuple[list[Any], Numbers]:
    """A graph without its whole numbers, and these: of the ops' arguments, then sizes and strides of the examples."""
    numbers: list[int] = []
    place: dict[fx.Node, int] = {}

    def seen(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return f"%{place[value]}"
        if type(value) is int:
            numbers.append(value)
            return "#"
        return repr(value)

    lines = []
    for node in module.graph.nodes:
        lines.append([node.op, str(node.target), repr(map_aggregate((node.args, node.kwargs), seen))])
        place[node] = len(place)
    for example in examples:
        numbers += [*example.size(), *example.stride()]
        lines.append([str(example.dtype), str(example.device), str(example.dim())])
    return lines, tuple(numbers)


def with_sizes(module: fx.GraphModule, family: Family) -> fx.GraphModule:
    """The graph with its whole numbers as terms of the sizes, which are its first inputs."""
    graph, left = fx.Graph(), iter(family.terms)
    sizes = [graph.placeholder(f"size_{i}") for i in range(len(family.places))]
    copies = {node: graph.placeholder(node.name) for node in module.graph.nodes if node.op == "placeholder"}
    values: dict[Term, Any] = {}

    def value_of(term: Term) -> Any:
        if term not in values:
            first, *rest = [sizes[i] for i in term.sizes] + [term.factor] * (term.factor != 1)
            values[term] = reduce(lambda a, b: graph.call_function(operator.mul, (a, b)), rest, first)
        return values[term]

    def copied(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return copies[value]
        if type(value) is int:
            term = next(left)
            return value_of(term) if term.sizes else value
        return value

    for node in module.graph.nodes:
        args, kwargs = map_aggregate((node.args, node.kwargs), copied)
        if node.op == "output":
            graph.output(args[0])
        elif node.op != "placeholder":
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
    return fx.GraphModule({}, graph)


def examples_at(examples: Sequence[Tensor], family: Family, sizes: Sequence[Any]) -> list[Tensor]:
    """Tensors like the examples of a graph of the family, at these sizes."""
    left = iter(family.terms[len(family.terms) - sum(2 * example.dim() for example in examples) :])
    found = []
    for example in examples:
        shape, strides = [[next(left).at(sizes) for _ in range(example.dim())] for _ in range(2)]
        found.append(torch.empty_strided(shape, strides, dtype=example.dtype, device=example.device))
    return found
