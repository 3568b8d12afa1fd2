"""The picture of samples, on a small untrained model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import samples
from bench.study import Costs, Study
from examples.digits.testbed import DIGITS
from tests.digits import tiny_digits

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("traced_once")]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_digits(tmp_path, width=32, experts=4, expert_width=32)


def test_panels_are_the_same_samples_with_fewer_and_fewer_full_steps(checkpoint: Path):
    study = Study(DIGITS, checkpoint, 6, 1.5, torch.device("cpu"))
    (plain, uncached), (near, few), (far, fewer) = samples.panels(study, "stack", [2, 6], rows=1)
    assert plain == "uncached, 6 steps" and near.startswith("stack, 2.0x fewer FLOPs, ")
    assert uncached.shape == (10, 1, 8, 8)
    assert (few - uncached).abs().max() > 0 and (few - uncached).norm() < (fewer - uncached).norm()
    assert float(near.split()[-2]) > float(far.split()[-2]) > 10


def test_the_sampler_is_told_to_recipes_that_ask(monkeypatch: pytest.MonkeyPatch, checkpoint: Path):
    asked, study = [], Study(DIGITS, checkpoint, 6, 1.5, torch.device("cpu"))
    images, costs = torch.zeros(10, 1, 8, 8), Costs(2.0)
    monkeypatch.setattr(
        samples, "pictures_of", lambda _s, _q, case: (asked.append(case.options), ([images], costs))[1]
    )
    list(samples.panels(study, "auto", [3], rows=1))
    list(samples.panels(study, "fora", [3], rows=1))
    auto = {"recipe": "auto", "full_every": 3, "sampler": "deterministic"}
    assert asked == [None, auto, None, {"recipe": "fora", "full_every": 3}]


def test_a_picture_is_written(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, given = tmp_path / "made.png", ["--rows", "1", "--steps", "4", "--full-every", "2"]
    assert samples.main(["--testbed", "digits", "--checkpoint", str(checkpoint), "--out", str(out), *given]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and str(out) in capsys.readouterr().out


def test_a_missing_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert samples.main(["--testbed", "emoji", "--checkpoint", str(tmp_path / "none.safetensors")]) == 1
    assert "no checkpoint at" in capsys.readouterr().err


def test_a_testbed_brings_its_guidance_and_the_name_of_its_picture():
    args = samples.parse_arguments(["--testbed", "mnist"])
    assert args.guidance == 1.5 and args.out == samples.IMAGES / "samples-mnist.png"
