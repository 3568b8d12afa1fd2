"""The compiled parts of a model's steps.

A part that equals one at hand is not compiled again, whatever kind of step it is in. One that differs from it in the
batch size alone is compiled once for all sizes: two graphs of the same ops, in which every number that differs is a
line through two sizes, are one graph of that size. Whether a third size is on the line is seen by its own graph, as
it was traced.
"""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from moeca_compile._torch_private import compile_for_sizes, compile_graph, size_of
from moeca_compile.disk.keys import digest
from moeca_compile.lower.executor import Compiled
from moeca_compile.text import first_line

_log = logging.getLogger(__name__)

_SMALLEST = 2
"""Sizes of 1 broadcast, and stay graphs of their own."""


class Term(NamedTuple):
    """A number in a graph: constant + factor * size."""

    constant: int
    factor: int

    def at(self, size: Any) -> Any:
        return self.constant + self.factor * size if self.factor else self.constant


class Place(NamedTuple):
    """Where a graph reads the size: a dim of an input."""

    input: int
    dim: int


@dataclass(frozen=True)
class _Known:
    """Code that is there as long as a step that calls it.

    Attributes:
        code: a weak reference.
        numbers: what it was compiled for.
        terms: where it is for all sizes, the numbers of each.
        variable: the place of the size among the numbers.
        holds: whether the code is right for a size.
    """

    code: Callable[[], Compiled | None]
    numbers: tuple[int, ...]
    terms: tuple[Term, ...] = ()
    variable: int = 0
    holds: Callable[[int], bool] = lambda size: True

    def serves(self, numbers: tuple[int, ...]) -> bool:
        if not self.terms:
            return numbers == self.numbers
        size = numbers[self.variable]
        fits = size >= _SMALLEST and all(n == term.at(size) for n, term in zip(numbers, self.terms, strict=True))
        return fits and self.holds(size)


class Part(Protocol):
    """A graph that is compiled."""

    def module(self) -> fx.GraphModule:
        """The graph: (inputs...) -> [outputs]."""

    def examples(self) -> list[Tensor]:
        """Tensors like the inputs, real or fake."""


class Parts:
    """The compiled parts of one model. Call it under Dynamo's lock."""

    def __init__(self) -> None:
        self.compiled = 0
        """How many parts Inductor was asked for."""
        self._known: dict[str, list[_Known]] = {}

    def code(
        self,
        subgraph: Part,
        random: bool,
        all_sizes: bool,
        on_code: Callable[[str], None] | None = None,
    ) -> Compiled:
        """The code of a subgraph.

        Args:
            random: whether its ops draw the random numbers that they draw in eager mode.
            all_sizes: whether one code may serve several batch sizes.
            on_code: called with the path of Inductor's code, which is written anew for that.
        """
        if on_code is not None:
            self.compiled += 1
            return compile_graph(subgraph.module(), subgraph.examples(), on_code, random)
        module, examples = subgraph.module(), subgraph.examples()
        structure, numbers = without_sizes(module, examples)
        known = self._known.setdefault(digest(structure, random), [])
        known[:] = [each for each in known if each.code() is not None]
        for each in known:
            code = each.code()
            if code is not None and each.serves(numbers):
                return code
        self.compiled += 1
        code = self._for_all_sizes(module, examples, numbers, random, known) if all_sizes else None
        if code is None:
            code = compile_graph(module, examples, None, random)
            known.append(_Known(weakref.ref(code), numbers))
        return code

    def missing(self, subgraphs: Sequence[Part], random: bool) -> list[tuple[Part, list[tuple[int, ...]]]]:
        """The subgraphs that are not compiled yet, each with the numbers of those that may differ in a size alone."""
        found = []
        for each in subgraphs:
            structure, numbers = without_sizes(each.module(), each.examples())
            known = [other for other in self._known.get(digest(structure, random), []) if other.code() is not None]
            if not any(other.serves(numbers) for other in known):
                found.append((each, [other.numbers for other in known if not other.terms]))
        return found

    def note(self, subgraph: Part, random: bool, numbers: Sequence[int]) -> None:
        """Note that another process has code for a subgraph with other numbers, but the structure of this one."""
        structure, _ = without_sizes(subgraph.module(), subgraph.examples())
        self._known.setdefault(digest(structure, random), []).append(_Known(lambda: _elsewhere, tuple(numbers)))

    def for_all_sizes(self, code: Compiled) -> bool:
        """Whether this code of a part serves several batch sizes."""
        return any(each.terms and each.code() is code for known in self._known.values() for each in known)

    def _for_all_sizes(
        self,
        module: fx.GraphModule,
        examples: Sequence[Tensor],
        numbers: tuple[int, ...],
        random: bool,
        known: list[_Known],
    ) -> Compiled | None:
        """Code for all sizes, by the numbers of this one and of one that is known; None where there is none."""
        lines = (line_through(each.numbers, numbers, examples) for each in known if not each.terms)
        line = next(filter(None, lines), None)
        if line is None:
            return None
        terms, place, variable = line
        size = numbers[variable]
        try:
            graph = with_size(module, terms, place)
            code, holds = compile_for_sizes(graph, lambda size: _at(examples, terms, size), size, random)
        except Exception as error:
            _log.debug("a part is compiled for each size: %s", first_line(error), exc_info=True)
            return None
        found = _Known(weakref.ref(code), numbers, terms, variable, holds)
        if not found.serves(numbers):
            _log.debug("a part is compiled for each size: its code is for one alone")
            return None
        known.append(found)
        return code


def _elsewhere(*inputs: Any) -> Any:
    raise LookupError("this code is in another process")


def without_sizes(module: fx.GraphModule, examples: Sequence[Tensor]) -> tuple[list[Any], tuple[int, ...]]:
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


def line_through(
    one: tuple[int, ...], other: tuple[int, ...], examples: Sequence[Tensor]
) -> tuple[tuple[Term, ...], Place, int] | None:
    """The numbers of a graph as terms of a size that an input has, by their values at two sizes.

    Returns the terms, the input that has the size, and the place of the size among the numbers; None where the
    numbers are on no line, or no input has the size.
    """
    places = _places(examples, len(one))
    varying = [(one[at], at) for at in places if one[at] != other[at] and min(one[at], other[at]) >= _SMALLEST]
    if not varying:
        return None
    first, variable = min(varying)
    change = other[variable] - first
    if any((b - a) % change for a, b in zip(one, other, strict=True)):
        return None
    factors = [(b - a) // change for a, b in zip(one, other, strict=True)]
    terms = tuple(Term(a - factor * first, factor) for a, factor in zip(one, factors, strict=True))
    return terms, places[variable], variable


def _places(examples: Sequence[Tensor], count: int) -> dict[int, Place]:
    """The sizes of the examples, by their places among the numbers."""
    at, found = count - sum(2 * example.dim() for example in examples), dict[int, Place]()
    for i, example in enumerate(examples):
        found |= {at + dim: Place(i, dim) for dim in range(example.dim())}
        at += 2 * example.dim()
    return found


def with_size(module: fx.GraphModule, terms: Sequence[Term], place: Place) -> fx.GraphModule:
    """The graph with its whole numbers as terms of the size that it reads of an input."""
    graph, copies, left = fx.Graph(), dict[fx.Node, fx.Node](), iter(terms)
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    copies |= {node: graph.placeholder(node.name) for node in inputs}
    size = size_of(graph, copies[inputs[place.input]], place.dim)
    values: dict[Term, Any] = {}

    def value_of(term: Term) -> Any:
        if term not in values:
            scaled = size if term.factor == 1 else graph.call_function(operator.mul, (size, term.factor))
            values[term] = graph.call_function(operator.add, (scaled, term.constant)) if term.constant else scaled
        return values[term]

    def copied(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return copies[value]
        if type(value) is int:
            term = next(left)
            return value_of(term) if term.factor else value
        return value

    for node in module.graph.nodes:
        args, kwargs = map_aggregate((node.args, node.kwargs), copied)
        if node.op == "output":
            graph.output(args[0])
        elif node.op != "placeholder":
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
    return fx.GraphModule({}, graph)


def _at(examples: Sequence[Tensor], terms: Sequence[Term], size: Any) -> list[Tensor]:
    """Tensors like the examples at a size."""
    left = iter(terms[len(terms) - sum(2 * example.dim() for example in examples) :])
    found = []
    for example in examples:
        sizes, strides = [[next(left).at(size) for _ in range(example.dim())] for _ in range(2)]
        found.append(torch.empty_strided(sizes, strides, dtype=example.dtype, device=example.device))
    return found
