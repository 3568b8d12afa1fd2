"""The benchmark of the first picture: its rows are medians of starts in processes of their own."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest

from bench import first_picture

pytestmark = pytest.mark.bench


def test_starts_become_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders: list[Path] = []

    def started(name: str, way: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
        folders.append(folder)
        return {"first": 1.0 + len(folders), "total": 9.0}

    monkeypatch.setattr(first_picture, "in_a_process", started)
    out = tmp_path / "rows.csv"
    assert first_picture.main(["--repeats", "3", "--model", "tiny", "--out", str(out)]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == list(first_picture.WAYS)
    assert [float(row["first"]) for row in rows] == [5, 6, 7] and {row["repeats"] for row in rows} == {"3"}
    assert len(set(folders)) == 9


@pytest.mark.slow
def test_a_start_of_a_tiny_model(tmp_path: Path):
    args = argparse.Namespace(batch=2, threads=1, steps=3)
    found = first_picture.in_a_process("tiny", "background", args, tmp_path)
    assert 0 < found["first"] < found["picture"] < found["ready"] and found["early"] >= 3
