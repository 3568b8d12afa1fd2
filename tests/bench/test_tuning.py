"""The study of a tune on a small untrained model: it writes what it found, and compares what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import tuning
from moeca_compile import Tuned
from tests.digits import tiny_digits

pytestmark = pytest.mark.bench


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_digits(tmp_path, width=16, experts=3, expert_width=16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:moeca")
def test_a_tune_and_a_comparison(checkpoint, tmp_path):
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    sizes = ["--batch", "2", "--steps", "8", "--seeds", "2", "--fresh", "1", "--full-every", "2", "--speedup", "1.01"]
    files = ["--checkpoint", str(checkpoint), "--out", str(out), "--plot", str(plot), "--lowering", "eager"]
    assert tuning.main([*sizes, *files]) == 0
    values, found = json.loads(out.read_text()), Tuned.load(out)
    assert (found.steps, found.calls) == (8, 8) and values["tune_seconds"] > 0 and plot.stat().st_size > 1000
    assert [(row["schedule"], row["full_steps"]) for row in values["compared"]] == [
        ("uniform", 4),
        ("power", 4),
        ("calibrated", 4),
    ]
    assert all(row["worst"] <= row["psnr"] < 150 for row in values["compared"])


def test_no_checkpoint_is_said(tmp_path, capsys):
    assert tuning.main(["--checkpoint", str(tmp_path / "none.safetensors")]) == 1
    assert "tuning.py: no checkpoint" in capsys.readouterr().err
