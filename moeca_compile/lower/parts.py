"""The compiled parts of a model's steps.

A part that equals one at hand is not compiled again, whatever kind of step it is in. One that differs from it in the
batch size alone is compiled once for all sizes: two graphs of the same ops, in which every number that differs is a
multiple of one size, are one graph of that size. Whether this holds at a third is seen by its own graph, as it was
traced.
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

from moeca_compile._torch_private import compile_for_sizes, compile_graph
from moeca_compile.disk.keys import digest, modes
from moeca_compile.lower.executor import Compiled
from moeca_compile.text import first_line

_log = logging.getLogger(__name__)

_SMALLEST = 2
"""Sizes of 1 broadcast, and stay graphs of their own."""


class Term(NamedTuple):
    """A number in a graph, constant + factor * size; one of the two is 0."""

    constant: int
    factor: int

    def at(self, size: Any) -> Any:
        return self.constant + self.factor * size if self.factor else self.constant


class Place(NamedTuple):
    """What is the size: a dim of an input."""

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
        return is_on(numbers, self.terms, self.variable) and self.holds(numbers[self.variable])


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
        known = self._known.setdefault(_key(structure, random), [])
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
            known = [other for other in self._known.get(_key(structure, random), []) if other.code() is not None]
            if not any(other.serves(numbers) for other in known):
                found.append((each, [other.numbers for other in known if not other.terms]))
        return found

    def note(self, subgraph: Part, random: bool, numbers: Sequence[int]) -> None:
        """Note that another process has code for a subgraph with other numbers, but the structure of this one."""
        structure, _ = without_sizes(subgraph.module(), subgraph.examples())
        self._known.setdefault(_key(structure, random), []).append(_Known(lambda: _elsewhere, tuple(numbers)))

    def for_all_sizes(self, code: Compiled) -> tuple[int, ...]:
        """Where this code serves several batch sizes, the numbers of the one at which it was compiled; else ()."""
        every = (each for known in self._known.values() for each in known if each.terms and each.code() is code)
        return next((each.numbers for each in every), ())

    def _for_all_sizes(
        self,
        module: fx.GraphModule,
        examples: Sequence[Tensor],
        numbers: tuple[int, ...],
        random: bool,
        known: list[_Known],
    ) -> Compiled | None:
        """Code for all sizes, by the numbers of this one and of one that is known; None where there is none."""
        lines = (multiples_of_a_size(each.numbers, numbers, examples) for each in known if not each.terms)
        line = next(filter(None, lines), None)
        if line is None:
            return None
        terms, place, variable = line
        size = numbers[variable]
        try:
            graph = with_size(module, terms)
            sized, holds = compile_for_sizes(graph, lambda size: _at(examples, terms, size), size, random)
        except Exception as error:
            _log.debug("a part is compiled for each size: %s", first_line(error), exc_info=True)
            return None

        def code(*inputs: Any) -> Any:
            return sized(inputs[place.input].shape[place.dim], *inputs)

        found = _Known(weakref.ref(code), numbers, terms, variable, holds)
        if not found.serves(numbers):
            _log.debug("a part is compiled for each size: its code is for one alone")
            return None
        known.append(found)
        return code


def _key(structure: list[Any], random: bool) -> str:
    return digest(structure, random, modes())


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


def multiples_of_a_size(
    one: tuple[int, ...], other: tuple[int, ...], examples: Sequence[Tensor]
) -> tuple[tuple[Term, ...], Place, int] | None:
    """The numbers of a graph as terms of a size that an input has, by their values at two sizes.

    Returns the terms, the input that has the size, and the place of the size among the numbers; None where the
    numbers that differ are no multiples of one, or no input has it.
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
    if any(term.constant and term.factor for term in terms):  # two sizes have changed, and two points are a line
        return None
    return terms, places[variable], variable


def is_on(numbers: Sequence[int], terms: Sequence[Term], variable: int) -> bool:
    """Whether the numbers of a graph are these terms of one of them, a size of 2 or more."""
    size = numbers[variable]
    return size >= _SMALLEST and all(n == term.at(size) for n, term in zip(numbers, terms, strict=True))


def _places(examples: Sequence[Tensor], count: int) -> dict[int, Place]:
    """The sizes of the examples, by their places among the numbers."""
    at, found = count - sum(2 * example.dim() for example in examples), dict[int, Place]()
    for i, example in enumerate(examples):
        found |= {at + dim: Place(i, dim) for dim in range(example.dim())}
        at += 2 * example.dim()
    return found


def with_size(module: fx.GraphModule, terms: Sequence[Term]) -> fx.GraphModule:
    """The graph with its whole numbers as terms of a size, which is its first input."""
    graph, left = fx.Graph(), iter(terms)
    size = graph.placeholder("size")
    copies = {node: graph.placeholder(node.name) for node in module.graph.nodes if node.op == "placeholder"}
    values: dict[Term, Any] = {}

    def value_of(term: Term) -> Any:
        if term not in values:
            values[term] = size if term.factor == 1 else graph.call_function(operator.mul, (size, term.factor))
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
