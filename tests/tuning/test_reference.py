"""What uncached runs show: steps, times and inner products; and loops that cannot be compared are refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import moeca_compile
from moeca_compile.tuning.reference import NO_SEED, NOT_CALLED, reference_runs

CPU = torch.device("cpu")


class Velocity(nn.Module):
    """forward(x (B, 3), t, scale) -> x like."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, x, t, scale=1.0):
        return {"flag": torch.ones(1, dtype=torch.bool), "sample": scale * (x @ self.weight) * t.mean()}


def noise(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))


def once(model, seed):
    x = noise(seed)
    for t in (1.0, 0.7, 0.5, 0.4):
        x = x - 0.1 * model(x, torch.full((2,), t), scale=1.0)["sample"]
    return x


def twice(model, seed):
    """Two calls a step, as with guidance; the time is a number for all and comes by name."""
    x = noise(seed)
    for t in (10, 20, 30):
        plain, guided = (model(x, t=torch.tensor(float(t)), scale=scale)["sample"] for scale in (1.0, 2.0))
        x = x - 0.01 * (guided - plain)
    return x


def recorded(sample, seeds=(0, 1, 2), kept=(0, 1), steps=None):
    return reference_runs(Velocity().eval(), sample, seeds, kept, steps, CPU, lambda: None)


def test_steps_times_and_weights_by_the_argument_that_moves():
    known = recorded(once)
    assert (known.calls, known.steps) == (4, 4)
    assert known.times == pytest.approx((1.0, 0.7, 0.5, 0.4))
    assert known.weights == pytest.approx([0.3 / 0.7, 0.2 / 0.7, 0.1 / 0.7, 0.1 / 0.7])
    assert set(known.outputs) == {0, 1, 2}
    everything = torch.cat([*known.outputs.values()])
    assert known.data_range == pytest.approx(float(everything.max() - everything.min()))


def test_calls_at_one_time_are_one_step():
    known = recorded(twice)
    assert (known.calls, known.steps, known.times) == (6, 3, (10.0, 20.0, 30.0))
    assert known.weights == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("sample", [once, twice])
def test_inner_products_are_those_of_the_outputs_of_kept_seeds(sample):
    """Against the outputs, taken by a model that keeps them itself."""
    outputs: list[torch.Tensor] = []

    class Keeping(Velocity):
        def forward(self, x, t, scale=1.0):
            found = super().forward(x, t, scale)
            outputs.append(found["sample"].detach().flatten())
            return found

    known, expected = recorded(sample), np.zeros(())
    for seed in (0, 1):
        outputs.clear()
        sample(Keeping().eval(), seed)
        rows = torch.stack(outputs).reshape(known.steps, -1).double()
        expected = expected + (rows @ rows.T).numpy()
    np.testing.assert_allclose(known.gram, expected, rtol=1e-5)
    assert not np.allclose(recorded(sample, kept=(0,)).gram, expected)


def test_the_hook_is_gone_and_gradients_are_off():
    model = Velocity().eval()
    reference_runs(model, once, (0, 1), (0,), None, CPU, lambda: None)
    assert not model._forward_hooks
    with pytest.raises(ZeroDivisionError):
        reference_runs(model, lambda model, seed: 1 / 0, (0, 1), (0,), None, CPU, lambda: None)
    assert not model._forward_hooks


def test_outputs_in_a_dataclass_are_found():
    @dataclass
    class Outputs:
        flag: torch.Tensor
        sample: torch.Tensor

    class Typed(Velocity):
        def forward(self, x, t, scale=1.0):
            found = super().forward(x, t, scale)
            return Outputs(found["flag"], found["sample"])

    def sample(model, seed):
        x = noise(seed)
        for t in (1.0, 0.7, 0.5, 0.4):
            x = x - 0.1 * model(x, torch.full((2,), t), scale=1.0).sample
        return x

    found = reference_runs(Typed().eval(), sample, (0, 1, 2), (0, 1), None, CPU, lambda: None)
    np.testing.assert_allclose(found.gram, recorded(once).gram)


def test_a_loop_that_fills_one_buffer_again_is_seen_by_what_it_held():
    buffer = torch.zeros(2, 3)
    known, expected = recorded(lambda model, seed: buffer.copy_(once(model, seed))), recorded(once)
    assert all(torch.equal(known.outputs[seed], expected.outputs[seed]) for seed in (0, 1, 2))


def test_times_that_are_marked_count_before_arguments():
    def marked(model, seed):
        x = noise(seed)
        for t in (3.0, 2.0):
            with moeca_compile.step(t):
                for scale in (1.0, 2.0):
                    x = x - 0.1 * model(x, torch.ones(2), scale)["sample"]
        return x

    known = recorded(marked)
    assert (known.calls, known.steps, known.times) == (4, 2, (3.0, 2.0))


def test_steps_that_the_user_says_count():
    known = recorded(once, steps=2)
    assert (known.steps, known.times, known.gram.shape) == (2, None, (2, 2))
    with pytest.raises(ValueError, match="steps=3 does not fit the 4 calls"):
        recorded(once, steps=3)


def uneven(model, seed):
    x = noise(seed)
    for t in range(4 + seed % 2):
        x = x - 0.1 * model(x, torch.full((2,), 1.0 - 0.1 * t))["sample"]
    return x


count = iter(range(1000))
WRONG = {
    NOT_CALLED[:40]: lambda model, seed: noise(seed),
    "returned a list": lambda model, seed: [once(model, seed)],
    "returned a number": lambda model, seed: once(model, seed).sum(),
    "values that are not finite": lambda model, seed: once(model, seed) / 0,
    NO_SEED: lambda model, seed: once(model, 5),
    "other outputs for the same seed": lambda model, seed: once(model, next(count)),
    "4 calls in 4 steps and 5 calls in 5 steps": uneven,
}


@pytest.mark.parametrize("message", WRONG)
def test_a_loop_that_cannot_be_compared_is_refused(message):
    with pytest.raises(ValueError) as caught:
        recorded(WRONG[message])
    assert message in str(caught.value)
