"""The comparison with other tools on a small untrained model: what caches, what does nothing, and what fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import peers
from bench.peer_sections import code, page, ways
from bench.peer_sections.subjects import SUBJECTS, Subject, of_testbed
from bench.peer_sections.user_code import lines_of
from bench.peer_sections.ways import EAGER, OURS, Way
from bench.peer_sections.worker import Found, Generation, first_generations
from examples.digits.testbed import DIGITS
from tests.digits import tiny_digits

pytestmark = pytest.mark.bench
STEPS, SEEDS = 6, (1, 2)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """A small digits model in six steps, by the name of the large one, for its settings."""
    path = tiny_digits(tmp_path, width=32, experts=4, expert_width=32)
    small = of_testbed(DIGITS, steps=STEPS, images=1)
    return replace(small, make=lambda: DIGITS.load_model(path), probe="blocks.1.attn.qkv")


def run_here(subject: Subject, way: Way) -> peers.Run:
    """Run a way in this process."""
    running = ways.set_up(way, subject)
    found = first_generations(running, subject)
    made = [Generation(ways.generate(running, subject, seed), 1.0, 1.0, 0.0) for seed in SEEDS]
    return peers.Run(way, "", found, made, made)


def row_of(subject: Subject, way: Way) -> dict[str, Any]:
    wanted = run_here(subject, Way(EAGER, EAGER)).generations
    return peers.row_of(subject, run_here(subject, way), wanted)


def named(subject: Subject, label: str) -> Way:
    (found,) = (way for group in ways.groups(subject) for way in group if way.label == label)
    return found


# --- what a way is said to have done ------------------------------------------------------------------------


def test_a_tool_that_does_nothing_is_idle(subject: Subject):
    row = row_of(subject, Way("no-op", "no-op", (lambda model: model,), written=(code.compiled,)))
    assert row["status"] == peers.IDLE and row["full_steps"] == STEPS and row["reason"] == peers.NO_EFFECT


def test_a_tool_that_changes_the_pictures_is_not_idle(subject: Subject):
    def coarse(model: nn.Module) -> nn.Module:
        for weight in model.parameters():
            weight.data.mul_(1.01)
        return model

    row = row_of(subject, Way("coarse", "coarse", (coarse,), written=(code.compiled,)))
    assert row["status"] == peers.RAN and row["psnr"] < 100 and row["psnr_worst"] <= row["psnr"]


def test_the_hook_of_diffusers_caches_on_the_digits_model(subject: Subject):
    way = replace(
        named(subject, "FirstBlockCache"),
        prepare=(code.known_testbed, partial(code.first_block_cache, threshold=10.0)),
    )
    row = row_of(subject, way)
    assert row["status"] == peers.RAN and row["full_steps"] == 1  # of the first generation; later ones begin anew
    assert row["psnr"] < 100


def test_a_generation_begins_without_what_the_last_one_left(subject: Subject):
    way = replace(
        named(subject, "FirstBlockCache"),
        prepare=(code.known_testbed, partial(code.first_block_cache, threshold=10.0)),
    )
    running = ways.set_up(way, subject)
    first, again = (ways.generate(running, subject, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    carried = ways.set_up(replace(way, begin=None), subject)
    first, again = (ways.generate(carried, subject, seed=seed) for seed in (2, 1))
    assert not torch.equal(again, ways.generate(running, subject, seed=1))


def test_magcache_gets_the_ratios_of_a_calibration(subject: Subject):
    row = row_of(subject, named(subject, "MagCache, threshold"))
    assert row["status"] in (peers.RAN, peers.IDLE) and 1 <= row["full_steps"] <= STEPS


def test_seacache_is_told_where_the_loop_is(subject: Subject):
    row = row_of(subject, named(subject, "SeaCache"))
    assert row["full_steps"] < STEPS, "without the step it runs all steps in full"


# --- processes, failures and what is not installed ----------------------------------------------------------


def test_ways_run_beside_the_uncached_model_in_processes_of_their_own(subject: Subject):
    uncached = Way(EAGER, EAGER), Way("beside", EAGER)

    def fails(model: nn.Module) -> nn.Module:
        raise ValueError("no such block")

    chosen = Way("fails", "tool", (fails,), written=(code.compiled,)), Way("fine", EAGER)
    by_name = {run.way.name: run for run in peers.measure(subject, uncached, [chosen], SEEDS)}
    assert list(by_name) == [EAGER, "beside", "fails", "fine"]
    assert by_name["fails"].failure == "ValueError: no such block"
    assert len(by_name["fine"].generations) == len(by_name["fine"].beside) == len(SEEDS)
    same = zip(by_name["fine"].generations, by_name[EAGER].generations, strict=True)
    assert all(torch.equal(one.pictures, other.pictures) for one, other in same)
    row = peers.row_of(subject, by_name["fails"], by_name[EAGER].generations)
    assert row["status"] == peers.RAISED and row["psnr"] == "" and row["lines"] == 1


def test_the_command_compiles_nothing_in_eager(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SUBJECTS, "digits", subject)
    path, elsewhere = tmp_path / "rows.csv", ["--page", str(tmp_path / "p.md"), "--picture", str(tmp_path / "p.png")]
    asked = [
        "--subject",
        "digits",
        "--eager",
        "--seeds",
        "1",
        "--way",
        "N = 3",
        "--way",
        "FirstBlockCache, threshold",
    ]
    assert peers.main([*asked, "--out", str(path), *elsewhere]) == 0
    rows = {each["way"]: each for each in peers.read(path)}
    assert list(rows) == [EAGER, "moeca auto, N = 3", "FirstBlockCache, threshold"]
    assert rows["FirstBlockCache, threshold"]["over_eager_cpu"] and not rows[EAGER]["over_compile"]
    ours = rows["moeca auto, N = 3"]
    assert int(ours["full_steps"]) < STEPS and ours["psnr"] and not ours["cpu_seconds"]


def test_a_package_that_is_not_installed_gives_rows_that_say_so(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ways, "find_spec", lambda name: None if name == "cache_dit" else object())
    way = named(subject, "cache-dit DBCache")
    row = peers.row_of(subject, peers.Run(way, way.missing, Found()), [])
    assert (row["status"], row["reason"]) == (peers.SKIPPED, "cache-dit is not installed")
    assert row["lines"] > 0


# --- lines of the user's code -------------------------------------------------------------------------------


def one_line(model: Any) -> Any:
    """Not counted."""
    # nor is this
    model = torch.compile(model)

    return model


def around_the_call(model: Any, *arguments: Any) -> Any:
    with torch.no_grad():
        return model(*arguments)


def with_a_function(model: Any) -> Any:
    def pictures(arguments: Sequence[Tensor]) -> Tensor:
        return arguments[0]

    model.pictures = pictures
    return model


def test_lines_of_user_code_are_counted():
    assert lines_of([one_line]) == 1
    assert lines_of([around_the_call]) == 1
    assert lines_of([with_a_function]) == 3  # of a function of the user's own, all lines
    assert lines_of([one_line, one_line, around_the_call]) == 2  # each once


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_way_has_its_lines_and_a_name_of_its_own(name: str):
    every = [way for group in ways.groups(SUBJECTS[name]) for way in group]
    assert len({way.label for way in every}) == len(every)
    assert {way.lines for way in every if way.tool == OURS} == {1}
    assert all(way.lines >= 2 for way in every if way.tool in (ways.CACHE_DIT, ways.DIFFUSERS))


def test_what_no_row_of_ours_reaches_is_marked():
    rows = [
        row("digits", "ours", over_compile_cpu=3.0, psnr=45.0),
        row("digits", "slower and farther", tool="cache-dit", over_compile_cpu=2.0, psnr=40.0),
        row("digits", "nearer", tool="cache-dit", over_compile_cpu=2.0, psnr=46.0),
        row("digits", "faster", tool="diffusers", over_compile_cpu=3.5, psnr=30.0),
        row("digits", "eager", tool=EAGER, psnr=150.0),
    ]
    assert [each["way"] for each in page.ahead_of_ours(rows)] == ["nearer", "faster"]
    assert page.ahead_of_ours(rows[1:]) == []


# --- files --------------------------------------------------------------------------------------------------


def row(subject: str, way: str, **figures: Any) -> dict[str, Any]:
    every = dict.fromkeys(peers.FIGURES, 2.5) | {"lines": 1, "steps": 6, "full_steps": 2, "graphs": 1, "breaks": 0}
    return (
        {"subject": subject, "way": way, "tool": OURS, "status": "ran", "reason": "", "recompiles": 0}
        | every
        | figures
    )


def test_rows_replace_those_of_the_same_way(tmp_path: Path):
    path = tmp_path / "rows.csv"
    peers.replace_rows(path, [row("mnist", "a"), row("digits", "a"), row("digits", "b")])
    peers.replace_rows(path, [row("digits", "a", psnr=40.0)])
    found = [(each["subject"], each["way"], each["psnr"]) for each in peers.read(path)]
    assert sorted(found) == [("digits", "a", "40.0"), ("digits", "b", "2.5"), ("mnist", "a", "2.5")]
    assert [each[0] for each in found] == ["digits", "digits", "mnist"]


def test_page_and_picture_come_from_the_rows(tmp_path: Path):
    failed = dict.fromkeys(peers.FIGURES, "") | {
        "status": "raised",
        "reason": "ValueError: a | b",
        "tool": "cache-dit",
    }
    path, text = tmp_path / "rows.csv", tmp_path / "page.md"
    peers.replace_rows(
        path, [row("digits", "ours", psnr=150.0, over_eager_cpu=""), row("digits", "theirs", **failed)]
    )
    text.write_text("Before\n<!-- digits -->\nold\n<!-- digits -->\nAfter\n")
    argv = ["--draw", "--out", str(path), "--page", str(text), "--picture", str(tmp_path / "picture.png")]
    assert peers.main(argv) == 0
    written = text.read_text()
    assert "old" not in written and written.startswith("Before") and written.endswith("After\n")
    assert "| ours | 1 | 1, 0, 0 | 2 of 6 | 2.50x | 2.50x | equal | 2.5 |" in written
    assert "**raised**: ValueError: a / b" in written
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert page.table(peers.read(path)).count("\n") == 3
