"""Bytes by what they hold: all that is planned, under the kind of region that it is for."""

from __future__ import annotations

import pytest

from moeca_compile.reporting.memory import memory_by_kind

KINDS = {
    "moeca": {"attention", "feedforward", "shared experts", "experts", "experts, routing", "experts, statistics"},
    "fora": {"attention", "feedforward", "experts"},
    "stack": {"blocks"},
    "toca": {f"{kind}{what}" for kind in ("attention", "feedforward", "experts") for what in ("", ", statistics")},
    "teacache": {"blocks", "probe"},
    "magcache": {"blocks", "probe"},
    "none": set(),
}


@pytest.mark.usefixtures("eager_steps")
@pytest.mark.parametrize("recipe", KINDS)
def test_all_planned_bytes_are_told_by_kind(small_graph, recipe):
    compiled = small_graph.loop(recipe=recipe, validate=False).compiled
    found = memory_by_kind([compiled], 1000)
    assert found.pop("weights") == 1000
    assert found.keys() == KINDS[recipe]
    assert sum(found.values()) == compiled.plan.nbytes
    if recipe == "moeca":
        samples, tokens, width = 2, 16, 16
        attentions, values = 2, 3  # the output, keys and values
        assert found["attention"] == 4 * attentions * values * samples * tokens * width
        assert found["experts"] == 4 * samples * tokens * 2 * width


def test_graphs_add_up_and_without_one_there_is_nothing(small_graph, eager_steps):
    compiled = small_graph.loop(recipe="stack", validate=False).compiled
    assert memory_by_kind([compiled] * 2, 0)["blocks"] == 2 * compiled.plan.nbytes
    assert memory_by_kind([], 10) == {}
