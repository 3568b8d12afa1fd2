"""The benchmark of compile time: its rows are medians of starts in processes of their own."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest

from bench import compile_time

pytestmark = pytest.mark.bench


def test_starts_become_rows_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders: list[Path] = []

    def started(name: str, way: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
        folders.append(folder)
        spent = 1.0 + len(folders)
        steps = {f"{step}{unit}": spent for step in compile_time.STEPS for unit in ("", "_cpu")}
        return steps if way == "torch.compile" else steps | {"ours": 0.5}

    monkeypatch.setattr(compile_time, "in_a_process", started)
    out, picture = tmp_path / "rows.csv", tmp_path / "time.png"
    ways = ["--way", "torch.compile", "--way", "auto"]
    assert compile_time.main([*ways, "--repeats", "3", "--out", str(out)]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["way"], row["state"]) for row in rows] == [
        (way, state) for way in ("torch.compile", "auto") for state in ("cold", "warm")
    ]
    assert [float(row["full"]) for row in rows] == [6, 7, 8, 9] and {row["repeats"] for row in rows} == {"3"}
    assert all(cold == warm for cold, warm in zip(folders[::2], folders[1::2], strict=True))
    assert len(set(folders)) == 6
    assert compile_time.main(["--plot", "--out", str(out), "--picture", str(picture)]) == 0
    assert picture.stat().st_size > 1000


@pytest.mark.slow
def test_a_start_of_a_tiny_model(tmp_path: Path):
    args = compile_time.parse_arguments(["--batch", "2", "--threads", "1"])
    found = compile_time.in_a_process("tiny", "moeca", args, tmp_path)
    assert all(found[step] > 0 for step in (*compile_time.STEPS, "ours", "full_cpu"))
    args.one_size = True
    found = compile_time.in_a_process("tiny", "moeca", args, tmp_path)
    assert found["cache"] > 0 and "another" not in found
