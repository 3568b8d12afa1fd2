"""Experts divided over processes: the numbers of one process that holds all, and only what is recomputed travels."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from moeca_compile._torch_private.collectives import _PLAYS
from moeca_compile.runtime.ranks import DIFFERENT
from tests.processes import torchrun
from tests.runtime.exchange_worker import CASES, SMALL

FULL, CACHE = (0, 3), (1, 2, 4)
"""The numbers of full steps and of cache steps, where every third step is full."""
PLANNED = [0, 3, 6, 9, 12, 14]
"""The full steps of `auto` where a third of 16 are full."""
ROWS = 2 * SMALL.tokens
"""Tokens of a rank."""
ROW = 4 * SMALL.width
"""Bytes of a token's features."""

GLOO = dist.is_available() and dist.is_gloo_available()
pytestmark = pytest.mark.skipif(not (GLOO and _PLAYS), reason="torch without gloo, or one that plays no exchange")


def run(ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    out = folder / "found.json"
    torchrun(ranks, "tests/runtime/exchange_worker.py", str(out), folder=folder)
    return list(json.loads(out.read_text()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    return cache(lambda ranks: run(ranks, tmp_path_factory.mktemp("exchange")))


# Two ranks show the same as four, which take a minute to start.
@pytest.fixture(params=[pytest.param(ranks, marks=[pytest.mark.slow] * (ranks > 2)) for ranks in sorted(CASES)])
def found(request, runs):
    return runs(request.param)


@pytest.fixture
def two(runs):
    return runs(2)


def sent(case: dict[str, Any], what: str, steps: tuple[int, ...]) -> list[int]:
    return [case["sent"][step][what] for step in steps]


@pytest.mark.parametrize("way", ["by_counts", "in_blocks", "nothing_recomputed"])
def test_each_step_gives_what_one_process_with_all_experts_gives(found, way):
    for rank in found:
        assert max(rank[way]["errors"]) < 1e-5
        assert sum(rank[way]["steps"].values()) == 5 and rank[way]["steps"]["full"] == 2
        assert rank[way]["warnings"] == []
        ours, theirs = rank[way]["speedups"]
        assert ours == pytest.approx(theirs, rel=1e-3) and ours > 1.2


def test_by_counts_a_sixteenth_of_the_branches_sends_a_sixteenth_of_the_rows(found):
    full = sum(sum(sent(rank["by_counts"], "bytes", FULL)) for rank in found) / len(FULL)
    cached = sum(sum(sent(rank["by_counts"], "bytes", CACHE)) for rank in found) / len(CACHE)
    uncached = sum(rank["uncached"]["CountedLayer"]["bytes"] for rank in found)
    assert full == pytest.approx(uncached, rel=0.1)
    assert 1 / 32 < cached / full < 3 / 32


def test_blocks_have_the_size_that_the_shapes_tell_on_every_rank_and_at_every_step(found):
    ranks = len(found)
    own = SMALL.experts // ranks
    counts = 8 * SMALL.experts * (ranks - 1) // ranks  # of rows for each expert
    for rank in found:
        case = rank["in_blocks"]
        assert {*sent(case, "bytes", FULL)} == {2 * (ranks - 1) * ROWS * min(2, own) * ROW + counts}
        chosen = 2 * 2  # of 16 tokens in each of two samples: an eighth, as two branches of a token make one choice
        assert {*sent(case, "bytes", CACHE)} == {2 * (ranks - 1) * chosen * min(2, own) * ROW + counts}


def test_where_nothing_is_recomputed_nothing_is_called(found):
    for rank in found:
        case = rank["nothing_recomputed"]
        assert sent(case, "calls", CACHE) == sent(case, "agreements", CACHE) == [0, 0, 0]
        assert sent(case, "calls", FULL) == [3, 3]


def test_compiling_and_checking_call_no_rank(found):
    """The first call compiles, captures and validates, and sends what any full step does; ranks agree once."""
    for rank in found:
        first, later = (rank["in_blocks"]["sent"][step] for step in FULL)
        assert first == {**later, "agreements": 1} and later["agreements"] == 0


def test_a_layer_whose_places_run_out_gives_what_it_gives_on_one_process(two):
    for rank in two:
        case = rank["with_places_that_run_out"]
        assert max(*case["errors"], case["uncached"]) < 1e-5 and case["steps"]["full"] == 2
        assert max(sent(case, "bytes", CACHE)) < min(sent(case, "bytes", FULL)) / 4
        assert case["warnings"] == []


def test_whole_layers_from_the_cache_call_no_rank(two):
    for rank in two:
        case = rank["whole_layers_cached"]
        assert max(case["errors"]) < 1e-5 and sent(case, "calls", CACHE) == [0, 0, 0]


def test_what_the_data_decide_is_decided_for_all(two):
    one, other = (rank["decided_by_the_data"]["steps"] for rank in two)
    assert one == other and set(one) == {"full", "cache"}


def test_the_largest_error_decides_for_all_ranks(two):
    one, other = (rank["controlled_by_the_error"] for rank in two)
    assert one["together"] == other["together"] == one["alone"]
    assert one["alone"] != other["alone"], "each would decide by its own error"
    assert one["together"] not in (PLANNED, other["alone"])


def test_ranks_that_are_told_of_other_samplers_find_errors_on_all_or_on_none(two):
    """Here on none, so the full steps are the planned ones."""
    assert [rank["told_otherwise"]["full"] for rank in two] == [PLANNED, PLANNED]


def test_data_that_differ_let_no_rank_wait_for_another(two):
    one, other = (rank["uneven_data"]["steps"] for rank in two)
    assert one == other and sum(steps for kind, steps in one.items() if kind != "full") >= 8


@pytest.mark.parametrize("way", ["one_fails_validation", "one_has_no_numbers"])
def test_where_ranks_would_cache_different_things_all_steps_are_full_with_a_warning(two, way):
    for rank in two:
        assert max(rank[way]["errors"]) < 1e-5 and set(rank[way]["steps"]) == {"full"}
        assert any(DIFFERENT.partition("{0}")[0] in each for each in rank[way]["warnings"])


def test_an_error_in_a_step_is_raised(two):
    assert [rank["one_raises"]["raised"] for rank in two] == ["planted", ""]


def test_numbers_and_forms_are_compared_among_ranks(two):
    told = [True, None, False, False, False]
    assert [rank["agreed"] for rank in two] == [
        {"most": 1.0, "mean": 0.5, "alike": [True, False], "all say": told}
    ] * 2


def test_a_model_that_cannot_be_rewritten_runs_with_its_exchange(two):
    for rank in two:
        case = rank["cannot_be_compiled"]
        assert max(case["errors"]) < 1e-5 and min(sent(case, "calls", (0, 1, 2, 3, 4))) > 0
        assert len(case["warnings"]) == 1 and "planted" in case["warnings"][0]
