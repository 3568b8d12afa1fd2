"""Plots by matplotlib: the values that they draw, and what is said where there is nothing to draw."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest

from moeca_compile.reporting import Report
from tests.reporting.reports import make_report

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")

from matplotlib import pyplot  # noqa: E402


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def drawn(figure: str) -> tuple[list[list[float]], object]:
    axes = make_report().plot(figure)
    return axes.images[0].get_array().filled(math.nan).tolist(), axes


def test_match_and_reuse_are_by_layer_and_step():
    for figure, value in (("match", 0.9), ("reuse", 0.75)):
        values, axes = drawn(figure)
        assert len(values) == 2
        assert [row[1] for row in values] == [value, value] and all(math.isnan(row[3]) for row in values)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["blocks.0.mlp", "blocks.1.mlp"]
        assert axes.get_xlabel() == "step" and axes.images[0].get_clim() == (0, 1)


def test_tokens_are_by_step_and_place():
    values, axes = drawn("tokens")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "4", "5", "7"]
    assert [row.index(1.0) for row in values] == [1, 2, 4, 5, 7] and all(sum(row) == 1 for row in values)


def test_drift_is_by_region_and_full_step_and_routing_by_expert():
    values, _ = drawn("drift")
    assert values[0] == pytest.approx([0.3, 0.6]) and math.isnan(values[1][0]) and values[2] == [0.25, 0.25]
    values, _ = drawn("routing")
    assert values == [[3 * 4 + 40, 3 * 8 + 40, 3 * 12 + 40, 3 * 8 + 40], [12, 24, 36, 24]]


def test_activation_is_by_expert_and_place_and_the_title_says_in_which_layer():
    values, axes = drawn("activation")
    assert values == [[place * (expert + 1) % 16 for place in range(16)] for expert in range(4)]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("blocks.1.mlp", "token", "expert")


def test_it_is_drawn_on_given_axes():
    figure, axes = pyplot.subplots()
    assert make_report().plot("match", ax=axes) is axes
    assert len(figure.axes) == 2, "the colors have a scale"


def test_what_cannot_be_drawn_is_explained(monkeypatch):
    with pytest.raises(
        ValueError, match=r"no figure 'mach'\. The figures are match, reuse, tokens, drift, routing, activation"
    ):
        make_report().plot("mach")
    with pytest.raises(ValueError, match=r"nothing was traced.*with moeca_compile.trace"):
        Report().plot("match")
    with pytest.raises(ValueError, match="nothing for 'drift': it takes two full steps"):
        make_report(steps=2).plot("drift")
    with pytest.raises(ValueError, match="nothing for 'tokens': cache steps of this recipe"):
        make_report(steps=1).plot("tokens")
    trace = dataclasses.replace(make_report().traces[0], grid=None, mapped_layer="", activation=())
    with pytest.raises(ValueError, match="nothing for 'activation': how tokens lie in the picture is not known"):
        make_report(traces=(trace,)).plot("activation")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        make_report().plot("match")
