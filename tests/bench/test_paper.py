"""The paper's tables on a small untrained model, and how they are shown beside the paper's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import paper
from bench.study import Case
from moeca_compile import MoecaConfig
from tests.digits import tiny_digits

pytestmark = pytest.mark.bench


def test_every_case_has_options_that_the_config_takes_and_every_value_of_the_paper_a_case():
    for table in paper.tables():
        names = [case.name for case in table.cases]
        assert len(set(names)) == len(names) and set(table.theirs) <= set(names)
        assert {len(values) for values in table.theirs.values()} <= {len(table.columns)}
        for case in table.cases:
            if case.options is not None:
                MoecaConfig.from_options(case.options)


def test_a_stochastic_sampler_is_not_compared_with_runs_of_other_noise():
    for table in paper.tables():
        assert table.sampler != "ddpm" or all(case.options is not None for case in table.cases)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 3 with two cases of six steps, and Table 4 as it is, of which nothing is measured."""
    third, fourth = (table for table in paper.tables() if table.number in ("Table 3", "Table 4"))
    cases = (Case("alpha = 0.6", {"recipe": "moeca", "full_every": 3}), Case("alpha = 0", None, 3, "euler"))
    monkeypatch.setattr(paper, "tables", lambda: (replace(third, steps=6, cases=cases), fourth))


def test_a_table_is_measured_and_shown_beside_the_papers(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint = tiny_digits(tmp_path, width=32, experts=4, expert_width=32)
    out = ["--out", str(tmp_path / "rows.csv")]
    threads = str(torch.get_num_threads())
    argv = ["--checkpoint", str(checkpoint), "--images", "2", "--table", "3", "--threads", threads]
    assert paper.main([*argv, *out]) == 0
    capsys.readouterr()
    assert paper.main(["--show", *out]) == 0
    shown = capsys.readouterr().out
    first, second = (line for line in shown.splitlines() if line.startswith("| alpha"))
    assert first.startswith("| alpha = 0.6 | ") and first.endswith("% | 29.45 | 0.715 | 40.6 |")
    assert second.startswith("| alpha = 0 | 2.00x |") and second.endswith("| 29.11 | 0.708 | 40.9 |")
    assert "Here: euler, 6 steps, 2 pictures." in shown and "Table 4" not in shown  # its cases have no rows


def test_what_is_no_table_and_rows_that_are_not_there_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        paper.parse_arguments(["--table", "9"])
    assert "no table is called" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"run `python -m bench\.paper` first"):
        paper.main(["--show", "--out", str(tmp_path / "none.csv")])
