"""Helpers that read graphs."""

from __future__ import annotations

from moeca_compile.passes.analysis.graph import last_uses


def test_a_value_is_last_used_by_the_last_step_that_has_it():
    assert last_uses(["ab", "bc", "cad", "e"], kept="d") == [[], ["b"], ["c", "a"], ["e"]]


def test_a_step_that_reads_a_value_twice_uses_it_last_once():
    assert last_uses(["aa", "bab"], kept="") == [[], ["b", "a"]]
