"""Each reduced family is one graph, every region of it is cached, and its steps are exact."""

from __future__ import annotations

import pytest

from bench import coverage


@pytest.mark.sampled(3)
@pytest.mark.smoke
@pytest.mark.parametrize("family", ["DSMoE", "DiT-MoE", "Diff-MoE", "TC-DiT", "EC-DiT", "DiffMoE"])
def test_a_family_is_captured_whole(family: str):
    row = coverage.look_at(next(subject for subject in coverage.subjects() if subject.name == family))
    assert (row.failure, row.graphs, row.breaks, row.skipped) == ("", 1, [], [])
    for cached, present in (row.experts, row.attentions):
        assert cached == present > 0
    assert max(row.full, row.recomputed, *row.validation.values()) < 1e-5


@pytest.mark.smoke
def test_dense_dit_is_one_graph_that_moeca_leaves_alone():
    row = coverage.look_at(next(subject for subject in coverage.subjects() if subject.name == "DiT"))
    assert (row.graphs, row.breaks, row.experts) == (1, [], (0, 0))
    assert row.full == row.recomputed == 0
