"""Graphs that differ in sizes alone are one graph of these sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from moeca_compile._torch_private import trace_to_graph
from moeca_compile.lower.sizes import Family, Numbers, Term, examples_at, with_sizes, without_sizes


def first_rows(x: Tensor, weight: Tensor, kept: int) -> list[Tensor]:
    """As where the tokens of each sample with the highest score are recomputed: no input has their number."""
    samples, _, width = x.shape
    scores, chosen = x.sum(-1).topk(kept)
    rows = x.gather(1, chosen.unsqueeze(-1).expand(-1, -1, width)).reshape(samples * kept, width) @ weight
    return [rows.reshape(samples, kept, -1) + scores.unsqueeze(-1)]


WEIGHT = torch.randn(6, 8)


def traced(samples: int, kept: int) -> tuple[fx.GraphModule, list[Tensor]]:
    inputs = [torch.randn(samples, 32, 6), WEIGHT]
    return trace_to_graph(lambda *tensors: first_rows(*tensors, kept), *inputs), inputs


def numbers_of(samples: int, kept: int) -> Numbers:
    return without_sizes(*traced(samples, kept))[1]


@pytest.mark.smoke
def test_a_graph_of_two_sizes_is_the_graph_at_any() -> None:
    family = Family.of(numbers_of(2, 3)).with_another(numbers_of(2, 9))
    assert family is not None and family.sizes(numbers_of(2, 5)) == (5,)
    assert family.sizes(numbers_of(3, 5)) is None
    both = family.with_another(numbers_of(7, 9))
    assert both is not None and both.sizes(numbers_of(5, 11)) == (11, 5)
    assert Term(1, (0, 1)) in both.terms  # rows of all samples
    graph, (_, inputs) = with_sizes(traced(2, 3)[0], both), traced(5, 11)
    (found,) = graph(11, 5, *inputs)
    torch.testing.assert_close(found, first_rows(*inputs, 11)[0])
    assert [list(e.shape) for e in examples_at(inputs, both, (11, 5))] == [[5, 32, 6], [6, 8]]


def test_a_size_of_a_size_is_found_where_no_number_is_it() -> None:
    """All that depends on the batch is a number of rows, which depends on the tokens as well."""
    family = Family.of((12, 3)).with_another((20, 5))  # 4 samples, of which 3 or 5 tokens
    assert family is not None
    both = family.with_another((30, 5))  # 6 samples
    assert both is not None and both.sizes((14, 7)) == (7, 2) and both.sizes((15, 7)) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((4, 8), (4, 8)),
        ((1, 8), (2, 16)),
        ((4, 8), (1, 2)),
        ((4, 8), (5, 11)),
        ((4, 6), (8, 12)),
        ((4, 0), (8, 4)),
        ((4, -4), (8, -8)),
    ],
    ids=["equal", "from one", "to one", "two sizes", "no whole multiple", "zero", "negative"],
)
def test_what_is_no_size(one: Numbers, other: Numbers) -> None:
    assert Family.of(one).with_another(other) is None


def test_zeros_stay_zeros() -> None:
    family = Family.of((4, 0, 8)).with_another((6, 0, 12))
    assert family is not None and family.sizes((10, 0, 20)) == (10,) and family.sizes((10, 10, 20)) is None


@given(
    st.lists(st.tuples(st.integers(1, 5), st.sampled_from([(), (0,), (1,), (0, 1)])), min_size=1, max_size=6),
    st.tuples(*[st.lists(st.integers(2, 9), min_size=3, max_size=3, unique=True)] * 2),
)
def test_numbers_are_of_a_family_only_where_its_terms_give_them(
    terms: list[tuple[int, tuple[int, ...]]], sizes: tuple[list[int], list[int]]
) -> None:
    """Of whatever numbers a family was made, it gives those back, and any that are found in it."""
    first, second = sizes

    def numbers(a: int, b: int) -> Numbers:
        return tuple(Term(*term).at((a, b)) for term in [(1, (0,)), (1, (1,)), *terms])

    points = [numbers(first[0], second[0]), numbers(first[1], second[0]), numbers(first[1], second[1])]
    family: Family | None = Family.of(points[0])
    for point in points[1:]:
        family = family.with_another(point) if family is not None else None
    if family is None:  # the same factor and size by chance
        return
    assert [family.sizes(point) is not None for point in points] == [True] * 3
    found = family.sizes(numbers(first[2], second[2]))
    if found is not None:
        assert tuple(term.at(found) for term in family.terms) == numbers(first[2], second[2])
