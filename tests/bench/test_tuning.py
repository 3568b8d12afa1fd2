"""The study of a tune on a small untrained model: it writes what it found, and compares what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import tuning
from examples.digits.checkpoint import save_model
from examples.digits.model import DigitsConfig, DigitsDiT
from moeca_compile import Tuned

pytestmark = pytest.mark.bench


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = DigitsDiT(DigitsConfig(width=16, depth=2, heads=2, experts=3, expert_width=16))
    for parameter in model.parameters():
        if not parameter.any():  # adaLN-zero would hide every branch
            torch.nn.init.normal_(parameter, std=0.1)
    save_model(model, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


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
