"""The benchmark of capture: its seconds belong to the stages that they are named for, and its cases are layouts."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from bench import capture_time
from bench.capture_time import Case
from examples import families

pytestmark = pytest.mark.bench

SMALL = Case("blocks", "DiT-MoE", families.FAMILIES["DiT-MoE"].reduced, target=6.0)


def test_layouts_are_those_of_the_published_sizes():
    for case, name in zip(capture_time.questions()["layouts"], ("DSMoE-S-E48", "DiT-MoE-XL"), strict=True):
        _, published = families.PUBLISHED[name]
        assert (case.sizes.depth, case.sizes.top_k) == (published.depth, published.top_k)
    assert capture_time.DSMOE.experts == 48 and capture_time.DIT_MOE.experts == 16


def test_a_case_becomes_a_row_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capture_time, "questions", lambda: {"blocks": (SMALL,)})
    monkeypatch.setattr(capture_time, "DSMOE", families.FAMILIES["DSMoE"].reduced)
    out, picture = tmp_path / "rows.csv", tmp_path / "images" / "time.png"
    argv = ["--repeats", "1", "--threads", str(torch.get_num_threads()), "--out", str(out), "--picture", str(picture)]
    assert capture_time.main(argv) == 0
    with out.open() as file:
        (row,) = csv.DictReader(file)
    cpu, capture, passes = (float(row[name]) for name in ("cpu", "capture_cpu", "passes_cpu"))
    assert cpu == pytest.approx(capture + passes, abs=0.01) and min(capture, passes) > 0
    assert float(row["rewrite_cpu"]) > 0 and row["torch"] == torch.__version__
    assert (row["blocks"], row["experts"]) == ("3", "6")
    assert picture.stat().st_size > 1000


def test_a_model_that_is_not_captured_whole_is_no_measurement():
    with pytest.raises(RuntimeError, match="not captured whole"):
        capture_time.measure(Case("blocks", "DiT", families.FAMILIES["DiT"].reduced), repeats=1)
