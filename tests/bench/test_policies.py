"""The study of options on a small untrained model: its cases run, and its rows mean what they say."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import policies
from examples.digits.testbed import DIGITS
from examples.emoji.testbed import EMOJI
from examples.mnist.testbed import MNIST
from examples.testbed.checkpoint import save_model
from examples.testbed.metrics import EXACT_DB
from examples.testbed.model import MoEDiT
from examples.testbed.testbed import Testbed
from moeca_compile import MoecaConfig
from tests.digits import tiny_digits

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("traced_once")]

Rows = dict[str, dict[str, str]]
Run = Callable[..., Rows]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_digits(tmp_path, width=32, experts=4, expert_width=32)


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run cases of one question on the small model; gives their CSV rows by case."""

    def run(*cases: policies.Case, sampler: str = "euler", alone: bool = False, given: Sequence[str] = ()) -> Rows:
        question = policies.Question("test", cases, policies.Setting(sampler, images=2, sets=1, alone=alone))
        monkeypatch.setattr(policies, "questions", lambda: (question,))
        threads, out = torch.get_num_threads(), tmp_path / "rows.csv"
        argv = ["--steps", "6", "--checkpoint", str(checkpoint), "--out", str(out)]
        assert policies.main([*argv, "--threads", str(threads), *given]) == 0
        with out.open() as file:
            return {row["case"]: row for row in csv.DictReader(file)}

    return run


def test_every_case_has_options_that_the_config_takes():
    cases = [case for question in policies.questions() for case in question.cases]
    configs = [MoecaConfig.from_options(case.options) for case in cases if case.options is not None]
    assert {config.recipe for config in configs} == {
        "none", "auto", "fora", "fora-forecast", "stack", "stack-forecast", "moeca", "moeca-forecast", "block",
        "block-forecast", "taylorseer", "deepcache", "delta", "toca", "duca",
        "teacache", "block-cache", "magcache",
    }  # fmt: skip
    for question in policies.questions():
        assert len({case.name for case in question.cases}) == len(question.cases)


def test_pictures_that_are_made_alone_are_those_of_a_batch(run: Run):
    case = policies.Case("cached", {"recipe": "stack", "full_every": 3})
    together, alone = run(case), run(case, alone=True)
    assert float(alone["cached"]["psnr"]) == pytest.approx(float(together["cached"]["psnr"]), abs=0.01)
    assert alone["cached"]["flops_speedup"] == together["cached"]["flops_speedup"]


def test_rows_hold_quality_costs_and_where_they_were_measured(run: Run):
    rows = run(
        policies.Case("same", {"recipe": "none"}),
        policies.Case("cached", {"recipe": "moeca", "full_every": 3}),
        policies.Case("fewer", None, 3, "euler"),
    )
    same, cached, fewer = rows["same"], rows["cached"], rows["fewer"]
    assert float(same["psnr"]) > 100 and float(same["flops_speedup"]) == 1
    assert 10 < float(cached["psnr"]) < float(same["psnr"])
    assert float(cached["psnr_worst"]) <= float(cached["psnr"]) <= EXACT_DB
    assert float(cached["flops_speedup"]) > 1 and 0 < float(cached["match_ratio"]) <= 1
    assert int(cached["cache_bytes"]) > 0 and same["match_ratio"] == ""
    assert float(fewer["flops_speedup"]) == 2 and int(fewer["steps"]) == 3
    assert same["torch"] == torch.__version__ and same["dtype"] == "float32" and len(same["checkpoint"]) == 12


def test_a_recipe_that_needs_ratios_gets_those_of_another_seed(run: Run):
    rows = run(policies.Case("magcache", {"recipe": "magcache", "reuse_threshold": 1.0, "retention": 0.2}))
    assert float(rows["magcache"]["flops_speedup"]) > 1.5  # nothing of it was spent on measuring


@pytest.mark.parametrize("testbed", [MNIST, EMOJI], ids=lambda testbed: testbed.name)
def test_a_question_runs_on_another_testbed(testbed: Testbed, run: Run, tmp_path: Path):
    torch.manual_seed(0)
    model = MoEDiT(replace(testbed.config, width=16, depth=2, heads=1, experts=5, expert_width=8))
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    save_model(model, tmp_path / "small.safetensors")
    given = ["--testbed", testbed.name, "--checkpoint", str(tmp_path / "small.safetensors")]
    rows = run(policies.Case("fewer", None, 3, "euler"), given=given)
    assert 0 < float(rows["fewer"]["psnr"]) < EXACT_DB and float(rows["fewer"]["flops_speedup"]) == 2


def test_each_testbed_has_its_checkpoint_its_guidance_and_its_file_of_rows():
    digits, mnist = policies.parse_arguments([]), policies.parse_arguments(["--testbed", "mnist"])
    assert digits.checkpoint == DIGITS.model_path and mnist.checkpoint == MNIST.model_path
    assert digits.out == policies.RESULTS / "policies.csv" and mnist.out == policies.RESULTS / "policies-mnist.csv"
    emoji = policies.parse_arguments(["--testbed", "emoji"])
    assert (digits.guidance, emoji.guidance) == (1.5, EMOJI.guidance)
    assert policies.parse_arguments(["--testbed", "emoji", "--guidance", "1"]).guidance == 1


def test_the_stochastic_sampler_gets_the_same_noise(run: Run):
    rows = run(policies.Case("same", {"recipe": "none"}), sampler="ddpm")
    assert float(rows["same"]["psnr"]) > 100


def test_a_missing_checkpoint_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert policies.main(["--checkpoint", str(tmp_path / "none.safetensors")]) == 1
    assert "no checkpoint at" in capsys.readouterr().err
