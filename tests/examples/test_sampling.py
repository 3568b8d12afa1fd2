import pytest
import torch

from examples.digits.testbed import DIGITS
from examples.testbed.sampling import (
    NULL_CLASS,
    SAMPLERS,
    flow_coordinates,
    guided_velocity,
    make_scheduler,
    noise_prediction,
)

CENTRE, SPREAD = 0.3, 0.2


def exact_velocity(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """E[noise - x_0 | x_t] where x_0 is normal with mean 0.3 and deviation 0.2: a model in closed form."""
    t = t[:, None, None, None]
    variance = ((1 - t) * SPREAD) ** 2 + t**2
    covariance = t - (1 - t) * SPREAD**2  # of (noise - x_0) with x_t
    return -CENTRE + covariance / variance * (x - (1 - t) * CENTRE)


@pytest.mark.parametrize("alpha_bar", [1e-4, 0.3, 0.5, 0.999])
def test_noise_prediction_is_exact(alpha_bar):
    x_0, noise = torch.randn(2, 1, 8, 8).double(), torch.randn(2, 1, 8, 8).double()
    x = alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * noise
    seen = []

    def velocity(z, time):
        torch.testing.assert_close(z, (1 - time) * x_0 + time * noise)
        seen.append(time)
        return noise - x_0

    torch.testing.assert_close(noise_prediction(velocity, x, alpha_bar), noise)
    assert seen == [flow_coordinates(alpha_bar)[1]]
    assert 0 < seen[0] < 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_reach_the_distribution_of_a_model_in_closed_form(sampler):
    labels = torch.zeros(64, dtype=torch.int64)
    images = DIGITS.generate(exact_velocity, labels, steps=500, sampler=sampler, guidance=1.0)
    assert images.mean().item() == pytest.approx(CENTRE, abs=0.015)
    assert images.std().item() == pytest.approx(SPREAD, abs=0.015)  # DDPM: 0.16 in 50 steps, 0.19 in 500


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_times_fall_from_noise_to_data_once_a_step(sampler):
    times = []

    def model(x, t, y):
        assert (t == t[0]).all()
        times.append(t[0].item())
        return torch.zeros_like(x)

    DIGITS.generate(model, torch.zeros(1, dtype=torch.int64), steps=20, sampler=sampler)
    assert len(times) == 20
    assert times == sorted(times, reverse=True)
    assert 0 < times[-1] < 0.2 < 0.9 < times[0] <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_repeats_and_another_differs(sampler):
    first, again, other = (
        DIGITS.generate(exact_velocity, torch.zeros(2, dtype=torch.int64), steps=5, sampler=sampler, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_guidance_extrapolates_from_one_doubled_batch():
    calls = []

    def model(x, t, y):
        calls.append((len(x), y.tolist()))
        return y[:, None, None, None].float().expand_as(x)

    x, labels = torch.zeros(2, 1, 8, 8), torch.tensor([3, 5])
    velocity = guided_velocity(model, x, 0.5, labels, 2.0)
    assert calls == [(4, [3, 5, NULL_CLASS, NULL_CLASS])]
    assert velocity[:, 0, 0, 0].tolist() == [10 + 2 * (3 - 10), 10 + 2 * (5 - 10)]
    assert guided_velocity(model, x, 0.5, labels, 1.0)[:, 0, 0, 0].tolist() == [3, 5]
    assert calls[1] == (2, [3, 5])


def test_unknown_sampler_names_what_is_allowed():
    with pytest.raises(ValueError, match=r"'heun'.*euler, multistep, ddpm"):
        make_scheduler("heun", 10)
