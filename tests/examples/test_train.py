import torch

from examples.digits import train
from examples.digits.checkpoint import load_model
from examples.digits.model import DigitsConfig, DigitsDiT
from examples.digits.train import ema_update, flow_loss, learning_rate

SMALL = DigitsConfig(width=32, depth=2, heads=2, expert_width=16)


def test_a_short_run_lowers_the_loss_and_repeats_with_its_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "DigitsDiT", lambda: DigitsDiT(SMALL))
    monkeypatch.setattr(train, "LOG_EVERY", 10)
    monkeypatch.setattr(train, "EVALUATED", 10)
    for name in ("first", "again"):
        path = tmp_path / f"{name}.safetensors"
        train.main(["--steps", "40", "--batch", "16", "--device", "cpu", "--out", str(path)])
    log = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    losses = [float(line.split()[3].rstrip(",")) for line in log]
    assert losses[3] < 0.8 * losses[0]
    first, again = (load_model(tmp_path / f"{name}.safetensors") for name in ("first", "again"))
    assert first.cfg == SMALL
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_flow_loss_of_the_model_that_knows_nothing_is_the_targets_power():
    torch.manual_seed(0)
    model = DigitsDiT(SMALL).train()  # adaLN-zero: it predicts zero
    images = torch.full((256, 1, 8, 8), 0.5)
    loss = flow_loss(model, images, torch.zeros(256, dtype=torch.int64)).item()
    assert abs(loss - (1 + 0.25)) < 0.05


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] < 0.02
    assert max(rates) == 1.0
    assert rates.index(1.0) < 110
    assert 0.01 <= rates[-1] < 0.011


def test_ema_remembers_more_as_it_ages():
    average = [torch.zeros(1)]
    ema_update(average, [torch.ones(1)], 1)
    assert abs(average[0].item() - 9 / 11) < 1e-6
    ema_update(average, [torch.zeros(1)], 10**6)
    assert abs(average[0].item() - 9 / 11 * train.EMA_DECAY) < 1e-6
