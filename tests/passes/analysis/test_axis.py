"""Axes joined, cut and found in each other."""

from __future__ import annotations

import pytest
from torch import fx

from moeca_compile.passes.analysis.axis import Axis, Layout, Span, count, cut, join, offset_in, overlap

GRAPH = fx.Graph()
PICTURE, TEXT, OTHER = (GRAPH.placeholder(name) for name in ("picture", "text", "other"))


def tokens(source: fx.Node, start: int, stop: int) -> Axis:
    return (Span(source, start, stop),)


JOINT = (Span(PICTURE, 0, 16), Span(TEXT, 0, 5))


def test_joined_axes_follow_each_other():
    assert join([tokens(PICTURE, 0, 16), tokens(TEXT, 0, 5)]) == JOINT
    assert count(JOINT) == 21


def test_what_was_cut_and_is_joined_again_is_the_same_axis():
    assert join([cut(JOINT, 0, 7), cut(JOINT, 7, 18), cut(JOINT, 18, 21)]) == JOINT


def test_a_change_of_order_is_another_axis():
    assert join([cut(JOINT, 8, 16), cut(JOINT, 0, 8)]) == (Span(PICTURE, 8, 16), Span(PICTURE, 0, 8))


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 21, JOINT),
        (0, 16, tokens(PICTURE, 0, 16)),
        (16, 21, tokens(TEXT, 0, 5)),
        (3, 9, tokens(PICTURE, 3, 9)),
        (14, 18, (Span(PICTURE, 14, 16), Span(TEXT, 0, 2))),
        (4, 4, ()),
    ],
)
def test_cut(start, stop, expected):
    assert cut(JOINT, start, stop) == expected


@pytest.mark.parametrize(
    ("part", "place"),
    [
        (JOINT, 0),
        (tokens(PICTURE, 0, 16), 0),
        (tokens(TEXT, 0, 5), 16),
        (tokens(TEXT, 2, 4), 18),
        ((Span(PICTURE, 14, 16), Span(TEXT, 0, 2)), 14),
        (tokens(OTHER, 0, 5), None),
        (tokens(TEXT, 2, 6), None),
        ((Span(TEXT, 0, 5), Span(PICTURE, 0, 16)), None),
        ((Span(PICTURE, 0, 15), Span(TEXT, 0, 5)), None),
    ],
)
def test_place_of_a_part(part, place):
    assert offset_in(JOINT, part) == place


def test_overlap():
    assert overlap(JOINT, tokens(TEXT, 4, 9))
    assert not overlap(JOINT, tokens(TEXT, 5, 9))
    assert not overlap(JOINT, tokens(OTHER, 0, 5))


def test_layouts_with_other_tokens_are_not_equal():
    layout = Layout(0, 1, 2, 5)
    assert layout == Layout(0, 1, 2, 5, (Span(None, 0, 5),))
    assert layout != Layout(0, 1, 2, 5, tokens(TEXT, 0, 5))
    assert layout.along(JOINT) == Layout(0, 1, 2, 21, JOINT)
