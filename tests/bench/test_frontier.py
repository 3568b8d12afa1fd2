"""The frontier's tables on a small untrained model, and what is read off their rows."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import frontier, frontier_page
from bench.frontier import Panel
from bench.study import Case
from moeca_compile import MoecaConfig
from tests.digits import tiny_digits

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("traced_once")]

Run = Callable[[], dict[str, dict[str, str]]]

EULER, DDPM = Panel("euler", 6, 3.0, images=2), Panel("ddpm", 6, 1.0, images=2)
AUTO = Case("auto, N = 3", {"recipe": "auto", "sampler": "deterministic", "full_every": 3})
FEWER = Case("fewer multistep steps, N = 3", None, 2, "multistep")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Measure two cases in a panel of each kind; gives the rows by panel and case."""
    checkpoint = tiny_digits(tmp_path, width=32, experts=4, expert_width=32)
    monkeypatch.setattr(frontier, "panels", lambda *images: (EULER, DDPM))
    monkeypatch.setattr(frontier, "cases", lambda panel: (AUTO, FEWER) if panel is EULER else (AUTO,))
    monkeypatch.setattr("bench.study.CONVERGED_STEPS", 8)
    out = tmp_path / "rows.csv"

    def run() -> dict[str, dict[str, str]]:
        threads = str(torch.get_num_threads())
        assert frontier.main(["--checkpoint", str(checkpoint), "--out", str(out), "--threads", threads]) == 0
        with out.open(newline="") as file:
            return {f"{row['panel']}: {row['case']}": row for row in csv.DictReader(file)}

    return run


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cases that have run, in order."""
    names, run_case = [], frontier.run_case

    def noted(study: Any, setting: Any, case: Case) -> Any:
        names.append(f"{setting.sampler}: {case.name}")
        return run_case(study, setting, case)

    monkeypatch.setattr(frontier, "run_case", noted)
    return names


def test_every_case_has_options_that_the_config_takes_and_a_name_of_its_own():
    for panel in frontier.panels():
        found = list(frontier.cases(panel))
        assert len({case.name for case in found}) == len(found)
        for case in found:
            if case.options is not None:
                MoecaConfig.from_options(case.options)
            assert frontier.interval_of({"case": case.name}) in frontier.INTERVALS
            assert frontier.way_of({"case": case.name}) in frontier.WAYS


def test_some_ways_and_speed_ups_are_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    names: list[str] = []
    monkeypatch.setattr(frontier, "measure", lambda panel, chosen, study, rows: names.extend(c.name for c in chosen))
    argv = ["--panel", "euler-50-1", "--every", "3", "--every", "5", "--way", "auto", "--way", "fewer euler steps"]
    threads = str(torch.get_num_threads())
    assert frontier.main([*argv, "--out", str(tmp_path / "rows.csv"), "--threads", threads]) == 0
    assert names == [f"{way}, N = {every}" for way in ("auto", "fewer euler steps") for every in (3, 5)]


def test_a_stochastic_sampler_is_not_compared_with_runs_of_other_noise():
    names = [case.name for panel in frontier.panels() if panel.sampler == "ddpm" for case in frontier.cases(panel)]
    assert names and not any("fewer" in name for name in names)


def test_rows_hold_scores_costs_and_where_they_were_measured(run: Run):
    rows = run()
    auto, fewer, noisy = (rows[f"{name}: {case.name}"] for name, case in
                          (("euler-6-3", AUTO), ("euler-6-3", FEWER), ("ddpm-6-1", AUTO)))  # fmt: skip
    assert float(auto["flops_speedup"]) > 1.5 and float(fewer["flops_speedup"]) == 3
    assert 5 < float(auto["psnr_worst"]) <= float(auto["psnr_median"]) < 100
    assert 5 < float(auto["psnr_converged"]) < 100 and noisy["psnr_converged"] == ""
    assert 0 < float(auto["ssim"]) < 1 and auto["frechet_uncached"] == ""
    assert (fewer["sampler"], fewer["steps"], fewer["images"]) == ("multistep", "2", "2")
    assert auto["torch"] == torch.__version__ and len(auto["sources"]) == 12


def test_a_case_runs_again_only_where_something_differs(run: Run, ran: list[str], monkeypatch: pytest.MonkeyPatch):
    first = run()
    assert ran == ["euler: auto, N = 3", "euler: fewer multistep steps, N = 3", "ddpm: auto, N = 3"]
    del ran[:]
    assert run() == first and not ran
    other = Case(AUTO.name, {**AUTO.options, "full_every": 2})
    monkeypatch.setattr(frontier, "cases", lambda panel: (other, FEWER) if panel is EULER else (AUTO,))
    run()
    assert ran == ["euler: auto, N = 3"]
    del ran[:]
    monkeypatch.setattr(frontier, "sources_fingerprint", lambda: "others")
    assert {row["sources"] for row in run().values()} == {"others"} and len(ran) == 3


def test_what_ran_before_an_interruption_is_kept(run: Run, ran: list[str], monkeypatch: pytest.MonkeyPatch):
    run_case = frontier.run_case

    def interrupted(study: Any, setting: Any, case: Case) -> Any:
        if setting.sampler == "ddpm":
            raise KeyboardInterrupt
        return run_case(study, setting, case)

    monkeypatch.setattr(frontier, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(frontier, "run_case", run_case)
    del ran[:]
    assert len(run()) == 3 and ran == ["ddpm: auto, N = 3"]


def test_the_sources_are_known_by_their_contents(tmp_path: Path):
    (tmp_path / "package").mkdir()
    inner, file = tmp_path / "package" / "inner.py", tmp_path / "file.py"
    inner.write_text("a = 1"), file.write_text("b = 1")
    (tmp_path / "package" / "note.md").write_text("no code")
    known = [frontier.sources_fingerprint(tmp_path, ("package", "file.py"))]
    for changed in (inner, file):
        changed.write_text("c = 2")
        known.append(frontier.sources_fingerprint(tmp_path, ("package", "file.py")))
    (tmp_path / "package" / "note.md").write_text("still no code")
    assert len(set(known)) == 3 and frontier.sources_fingerprint(tmp_path, ("package", "file.py")) == known[-1]


# --- the page ---------------------------------------------------------------------------------------------------


def row(case: str, psnr: float, speed: float, panel: str = "euler-50-1") -> dict[str, str]:
    numbers = {"psnr": psnr, "psnr_error": 0.5, "flops_speedup": speed}
    return {"panel": panel, "case": case, **{name: str(value) for name, value in numbers.items()}}


ROWS = (
    row("auto, N = 3", 50.0, 2.93),
    row("auto, N = 5", 40.0, 4.98),
    row("stack, N = 3", 45.0, 2.94),
    row("fora, N = 3", 60.0, 2.5),  # too slow to be an opponent
    row("stack, N = 5", 41.5, 5.0),
    row("stack, N = 3", 70.0, 3.0, "euler-50-3"),  # another panel
)


def test_a_cell_has_the_strongest_opponent_that_is_as_fast():
    third, fifth = frontier_page.cells(ROWS)
    assert (third.opponent, fifth.opponent) == (ROWS[2], ROWS[4])
    assert third.lead == 5 and fifth.lead == -1.5 and fifth.error == pytest.approx(0.5**0.5)


def test_the_table_and_the_list_name_cells_in_which_auto_is_behind():
    found = frontier_page.cells(ROWS)
    assert list(frontier_page.table(found))[2] == (
        "| euler-50-1 |  | **50.0**; 45.0 stack |  | 40.0; **41.5** stack |  |"
    )
    assert list(frontier_page.behind(found)) == ["- euler-50-1, N = 5, 5.0x: 1.5 dB (± 0.7) behind stack"]


def test_a_faster_way_is_an_opponent_at_slower_speed_ups_too():
    rows = (row("auto, N = 2", 40.0, 2.0), row("stack, N = 4", 42.0, 4.0))
    (cell,) = frontier_page.cells(rows)
    assert cell.opponent == rows[1]


def test_the_picture_has_a_panel_for_each_sampler(tmp_path: Path):
    frontier_page.draw(ROWS, tmp_path / "to" / "picture.png")
    assert (tmp_path / "to" / "picture.png").stat().st_size > 5000


def test_rows_that_are_missing_are_named(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"bench\.frontier"):
        frontier_page.main(["--results", str(tmp_path / "none.csv")])
