"""The simulation of schedules: it gives the backend's pictures, and a gap alone is one gap of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moeca_compile
from bench import schedules
from bench.schedules import Pictures
from examples.digits.testbed import DIGITS
from examples.testbed import metrics
from examples.testbed.testbed import Testbed
from tests.digits import tiny_digits

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("traced_once")]
STEPS = 10
LABELS = torch.arange(2)


@pytest.fixture
def testbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Testbed:
    checkpoint = tiny_digits(tmp_path, width=32, experts=4, expert_width=32)
    loaded = DIGITS.load_model(checkpoint)
    monkeypatch.setattr(Testbed, "load_model", lambda self, path=None: loaded)
    return replace(DIGITS)


@pytest.mark.parametrize("sampler", ["euler", "multistep", "ddpm"])
def test_its_pictures_are_those_of_the_backend(testbed: Testbed, sampler: str):
    full = schedules.CURVED["tapered"](STEPS, 4, schedules.EXPONENT)
    pictures = Pictures(testbed, 2, STEPS, 3.0, sampler)
    told = "stochastic" if sampler == "ddpm" else "deterministic"
    options = {"recipe": "auto", "sampler": told, "full_every": 3, "lowering": "eager", "validate": False}
    options["check_inputs"] = False  # in so few steps noise changes the picture as if it were another request's
    torch._dynamo.reset()
    fast = torch.compile(testbed.load_model(), backend="moeca", options=options)
    with moeca_compile.generation(steps=STEPS):
        wanted = testbed.generate(fast, LABELS, steps=STEPS, guidance=3.0, sampler=sampler, seed=0)
    assert moeca_compile.report(fast).steps == {"full": 4, "cache": 6}
    assert metrics.psnr(pictures.by(full), wanted) > 90
    assert metrics.psnr(pictures.uncached, wanted) < 80  # what is cached can be seen


def test_without_cache_steps_pictures_are_uncached(testbed: Testbed):
    pictures = Pictures(testbed, 2, STEPS, 1.0, "euler")
    plain = testbed.generate(testbed.load_model(), LABELS, steps=STEPS, guidance=1.0, seed=0)
    assert metrics.psnr(pictures.uncached, plain) > 90


def test_the_last_gap_alone_differs_from_the_uncached_run_in_its_own_steps(testbed: Testbed):
    pictures = Pictures(testbed, 2, STEPS, 1.0, "euler")
    found = list(pictures.by_gap((0, 1, 4, 8)))
    assert [(start, end) for start, end, _ in found] == [(1, 4), (4, 8), (8, 10)]
    assert all(max(scores) < metrics.EXACT_DB for _, _, scores in found)
    # With one gap in all, alone and in the schedule are the same.
    ((_, _, alone),) = pictures.by_gap((*range(6), 9))
    assert alone == pytest.approx(pictures.scores((*range(6), 9)), abs=1e-3)


def test_more_pictures_than_a_batch_have_seeds_of_their_own(testbed: Testbed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schedules, "BATCH", 2)
    found = Pictures(testbed, 3, 2, 1.0, "euler").uncached
    assert len(found) == 3 and not torch.equal(found[0], found[2])


def test_the_command_prints_each_schedule_and_gap(testbed: Testbed, capsys: pytest.CaptureFixture[str]):
    threads = str(torch.get_num_threads())
    argv = ["--testbed", "digits", "--every", "3", "--images", "2", "--steps", "6", "--gaps", "--threads", threads]
    assert schedules.main([*argv, "--schedule", "even"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("digits, N = 3, even") and [line.split(":")[0].split() for line in lines[1:]] == [
        ["steps", "0", "to", "3"],
        ["steps", "3", "to", "6"],
    ]
