import subprocess
import sys
from pathlib import Path

import pytest

from examples import digits
from examples.digits.testbed import DIGITS
from examples.testbed import sample, train

SCRIPTS = Path(digits.__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: '0' is not allowed: give a whole number from 1 to 1000"),
        (["--steps", "many"], "'many' is not allowed"),
        (["--steps", "1001"], "from 1 to 1000"),
        (["--batch", "1"], "--batch: '1' is not allowed: give a whole number at least 2"),
        (["--recipe", "moca"], "'stack-forecast'"),
        (["--sampler", "heun"], "'multistep'"),
        (["--guidance", "nan"], "give a number >= 0"),
        (["--full-every", "0"], "at least 1"),
        (["--recipe", "moeca", "--corrector"], "'corrector' = True: it needs cache steps that recompute nothing"),
        (["--schedule", "even"], "'power'"),
        (["--device", "abacus"], "give cpu or cuda"),
        (["--out", "picture.gif"], "must end in .png"),
        (["--json", "nowhere/figures.json"], "there is no folder nowhere"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.parse_arguments(DIGITS, arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_defaults():
    args = sample.parse_arguments(DIGITS, [])
    assert args.recipe == list(sample.DEFAULT_RECIPES) and "auto" in args.recipe
    assert args.options == {"full_every": 4}, "schedule and corrector are the recipe's own"
    assert args.steps == 50


def test_options_of_the_backend():
    args = sample.parse_arguments(
        DIGITS, ["--recipe", "stack", "--full-every", "7", "--schedule", "power", "--corrector"]
    )
    assert args.options == {"full_every": 7, "schedule": "power", "corrector": True}


def test_recipes_given_twice_run_once():
    args = sample.parse_arguments(DIGITS, ["--recipe", "fora", "--recipe", "moeca", "--recipe", "fora"])
    assert args.recipe == ["fora", "moeca"]


def test_missing_checkpoint_stops_before_any_work(tmp_path, capsys):
    assert sample.main(DIGITS, ["--checkpoint", str(tmp_path / "gone.safetensors")]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "gone.safetensors" in err
    assert "train.py" in err


def test_damaged_checkpoint_stops_before_any_work(tmp_path, capsys):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"\x00" * 40)
    assert sample.main(DIGITS, ["--checkpoint", str(path)]) == 1
    assert "bad.safetensors is damaged" in capsys.readouterr().err


@pytest.mark.sampled(6)
@pytest.mark.parametrize("script", ["sample.py", "train.py"])
@pytest.mark.parametrize("testbed", ["digits", "mnist", "emoji"])
def test_scripts_run_from_any_folder(testbed, script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / testbed / script), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--steps" in done.stdout


def test_training_refuses_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(DIGITS, ["--steps", "0"])
    assert "at least 1" in capsys.readouterr().err
