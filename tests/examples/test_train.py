import re
from dataclasses import replace

import pytest
import torch

from examples.digits.testbed import DIGITS, DigitsConfig, load_model
from examples.testbed import train, training
from examples.testbed.model import MoEDiT
from examples.testbed.training import EMA_DECAY, cosine, ema_update, flow_loss, hold

SMALL = DigitsConfig(width=32, depth=2, heads=2, expert_width=16)
TESTBED = replace(DIGITS, config=SMALL)


def run(folder, name, *arguments, testbed=TESTBED):
    path = folder / f"{name}.safetensors"
    given = ["--batch", "16", "--device", "cpu", "--out", str(path), "--work", str(folder / "runs"), *arguments]
    return train.main(testbed, given), path


def equal(first, again):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 10)
    monkeypatch.setattr(train, "EVALUATED", 10)


def test_a_short_run_lowers_the_loss_and_repeats_with_its_seed(tmp_path, capsys):
    paths = [run(tmp_path, name, "--steps", "40")[1] for name in ("first", "again")]
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", capsys.readouterr().out, re.MULTILINE)]
    assert len(losses) == 8 and losses[3] < 0.8 * losses[0]
    first, again = map(load_model, paths)
    assert first.cfg == SMALL and equal(first, again)


def test_a_run_that_is_resumed_ends_as_one_that_was_never_stopped(tmp_path, monkeypatch):
    monkeypatch.setitem(training.SCHEDULES, "cosine", hold)
    monkeypatch.setattr(training, "WARMUP_STEPS", 4)
    _, whole = run(tmp_path, "whole", "--steps", "20")
    monkeypatch.setattr(train, "SAVE_EVERY", 10)
    draw, left = train.random_batches, iter(range(13))
    monkeypatch.setattr(train, "random_batches", lambda *of: lambda size: (next(left), draw(*of)(size))[1])
    with pytest.raises((StopIteration, RuntimeError)):  # stopped at step 13, the state is that of step 10
        run(tmp_path, "stopped", "--steps", "40")
    monkeypatch.setattr(train, "random_batches", draw)
    assert run(tmp_path, "resumed", "--steps", "20", "--resume")[0] == 0
    assert equal(load_model(whole), load_model(tmp_path / "resumed.safetensors"))


def test_more_steps_go_on_and_say_what_they_are_not(tmp_path, capsys):
    run(tmp_path, "made", "--steps", "4")
    assert run(tmp_path, "longer", "--steps", "8", "--resume")[0] == 0  # a cosine depends on where it ends
    assert "learning rates of another number of steps" in " ".join(capsys.readouterr().out.split())
    assert not equal(load_model(tmp_path / "longer.safetensors"), load_model(tmp_path / "made.safetensors"))


def test_a_state_of_another_run_is_refused(tmp_path, capsys):
    assert run(tmp_path, "none", "--resume")[0] == 1
    assert "there is no state at" in capsys.readouterr().out
    assert run(tmp_path, "made", "--steps", "4")[0] == 0
    assert run(tmp_path, "other", "--steps", "4", "--resume", "--lr", "0.1")[0] == 1
    assert "give the same arguments" in capsys.readouterr().out
    assert run(tmp_path, "same", "--steps", "4", "--resume")[0] == 0
    assert "learning rates of another" not in capsys.readouterr().out
    assert equal(load_model(tmp_path / "same.safetensors"), load_model(tmp_path / "made.safetensors"))


def test_images_may_be_left_as_they_are(tmp_path, capsys):
    upside_down = replace(TESTBED, augmented=lambda images: images.flip(2))
    made = {
        name: load_model(run(tmp_path, name, "--steps", "2", *given, testbed=testbed)[1])
        for name, testbed, given in (
            ("plain", TESTBED, ()),
            ("augmented", upside_down, ()),
            ("left", upside_down, ("--as-they-are",)),
        )
    }
    assert equal(made["left"], made["plain"]) and not equal(made["augmented"], made["plain"])
    with pytest.raises(SystemExit):
        train.main(TESTBED, ["--classifier", "--as-they-are"])
    assert "for the DiT" in capsys.readouterr().err


def test_flow_loss_of_the_model_that_knows_nothing_is_the_targets_power():
    torch.manual_seed(0)
    model = MoEDiT(SMALL).train()  # adaLN-zero: it predicts zero
    images = torch.full((256, 1, 8, 8), 0.5)
    loss = flow_loss(model, images, torch.zeros(256, dtype=torch.int64)).item()
    assert abs(loss - (1 + 0.25)) < 0.05


def test_a_cosine_rises_then_falls():
    rates = [cosine(step, 1000) for step in range(1000)]
    assert rates[0] < 0.02
    assert max(rates) == 1.0
    assert rates.index(1.0) < 110
    assert 0.01 <= rates[-1] < 0.011


def test_a_held_rate_falls_in_the_last_fifth_and_says_nothing_of_the_end_before():
    rates = [hold(step, 1000) for step in range(1000)]
    assert rates[0] == 1 / training.WARMUP_STEPS and set(rates[200:800]) == {1.0}
    assert rates[801] < 1.0 and rates[900] == pytest.approx(0.505) and 0.01 < rates[-1] < 0.016
    assert [hold(step, 5000) for step in range(800)] == rates[:800]


def test_ema_remembers_more_as_it_ages():
    average = [torch.zeros(1)]
    ema_update(average, [torch.ones(1)], 1)
    assert abs(average[0].item() - 9 / 11) < 1e-6
    ema_update(average, [torch.zeros(1)], 10**6)
    assert abs(average[0].item() - 9 / 11 * EMA_DECAY) < 1e-6
