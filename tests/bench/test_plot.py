"""The plots of step times, from rows written by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench import plot

pytestmark = pytest.mark.bench

WHERE = {"threads": "2", "dtype": "float32"}


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(way: str, kind: str, milliseconds: float, over: float, share: object = "") -> dict[str, object]:
    cold = 20 if way == "torch.compile" else 40
    case = {"model": "M", "way": way, "kind": kind, "milliseconds": milliseconds, "over_compile": over}
    return {**case, "share": share, "cold_seconds": cold, **WHERE}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = [row("torch.compile", "step", 100, 1)]
    for fraction, time, share in ((0.25, 220, 0.3), (0, 110, 0.0), (0, 104, 0.0)):  # measured twice
        rows.append(row(f"moeca {fraction:g}", "generation", time, 400 / time, share))
    return write(tmp_path / "speed.csv", rows)


def test_pictures(results, tmp_path):
    parts = [{"model": "M", "way": "moeca 0.25", "part": part, "milliseconds": 3, **WHERE} for part in ("a", "b")]
    split = write(tmp_path / "split.csv", parts)
    assert plot.main(["--results", str(results), "--split", str(split), "--to", str(tmp_path / "p")]) == 0
    assert {path.name for path in (tmp_path / "p").iterdir()} == {
        "speed.png",
        "step-split.png",
        "compile-time-pays.png",
    }


def test_the_latest_row_of_a_case_counts(results):
    rows = plot.read(results, ("model", "way", "kind"), 2, "float32")
    assert [r["milliseconds"] for r in rows if r["way"] == "moeca 0"] == ["104"]


def test_what_flops_allow():
    assert plot.allowed({"share": "0"}) == 4
    assert plot.allowed({"share": "1"}) == 1


def test_where_compiling_has_paid(results):
    """20 s more to compile, and 45 ms less a step."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots()
    plot.draw_compile(plot.read(results, ("model", "way", "kind"), 2, "float32"), axis)
    assert axis.get_legend().get_texts()[0].get_text() == "M: pays from step 444"
    pyplot.close(figure)


def test_no_rows_say_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match=r"no rows for 2 threads and float32: run `python -m bench.speed` first"):
        plot.main(["--results", str(tmp_path / "none.csv")])
