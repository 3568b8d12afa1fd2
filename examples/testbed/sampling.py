"""Sampling: diffusers' schedulers around ``model(x, t, y)``, with classifier-free guidance.

The model predicts the velocity of a rectified flow. After a change of scale and time
(``noise_prediction``) it is also an exact noise model of a variance-preserving process, so the
stochastic DDPM sampler needs no second checkpoint.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

# (x [B, C, H, W], t [B], y [B]) -> velocity like x
VelocityModel = Callable[[Tensor, Tensor, Tensor], Tensor]

SAMPLERS = ("euler", "multistep", "ddpm")
DETERMINISTIC = ("euler", "multistep")
TRAIN_TIMESTEPS = 1000
NULL_CLASS = 10


def make_scheduler(sampler: str, steps: int) -> Any:
    """A diffusers scheduler set to ``steps`` steps. Raises ValueError for an unknown sampler."""
    scheduler: Any  # diffusers' schedulers share no base class with these methods
    if sampler == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    elif sampler == "multistep":
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=TRAIN_TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True
        )
        scheduler.set_timesteps(steps)
    elif sampler == "ddpm":
        # Clipping x_0 would hide errors that caching causes.
        scheduler = DDPMScheduler(TRAIN_TIMESTEPS, clip_sample=False, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
    else:
        raise ValueError(f"unknown sampler {sampler!r}; allowed: {', '.join(SAMPLERS)}")
    return scheduler


def guided_velocity(model: VelocityModel, x: Tensor, time: float, labels: Tensor, guidance: float | Tensor) -> Tensor:
    """Velocity at ``time``. With guidance other than 1, the two passes are one batch of twice the size.

    ``guidance`` may have a number for each image, [B, 1, 1, 1]: there are two passes then, whatever they are.
    """
    if not isinstance(guidance, Tensor) and guidance == 1:
        return model(x, torch.full((len(x),), time, device=x.device), labels)
    y = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
    t = torch.full((2 * len(x),), time, device=x.device)
    conditional, unconditional = model(torch.cat([x, x]), t, y).chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def flow_coordinates(alpha_bar: float) -> tuple[float, float]:
    """Scale and time at which x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps lies on the straight flow.

    With scale s and time tau, x / s = (1 - tau) x_0 + tau eps.
    """
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    return signal + noise, noise / (signal + noise)


def noise_prediction(velocity: Callable[[Tensor, float], Tensor], x: Tensor, alpha_bar: float) -> Tensor:
    """eps for a variance-preserving x, from a velocity v(z, tau) = eps - x_0: eps = z + (1 - tau) v."""
    scale, time = flow_coordinates(alpha_bar)
    z = x / scale
    return z + (1 - time) * velocity(z, time)


@torch.no_grad()
def generate(
    model: VelocityModel,
    labels: Tensor,
    *,
    shape: tuple[int, int, int],
    steps: int = 50,
    guidance: float = 1.5,
    sampler: str = "euler",
    seed: int = 0,
    rows: slice = slice(None),
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Images [B, *shape], near [-1, 1], of the classes ``labels`` [B]; only ``rows`` of them, where these are given.

    Noise is drawn on the CPU, so that a seed gives the same noise on every device, and for the whole batch, so that
    a row is the same with others and alone. ``on_step`` is called after each step. Raises ValueError for an unknown
    sampler.
    """
    scheduler = make_scheduler(sampler, steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), *shape, generator=generator).to(labels.device)
    extra = {"generator": generator} if sampler == "ddpm" else {}

    def velocity(z: Tensor, time: float) -> Tensor:
        found = torch.zeros_like(z)  # other rows are carried along, for the noise that the sampler draws
        found[rows] = guided_velocity(model, z[rows], time, labels[rows], guidance)
        return found

    for index, timestep in enumerate(scheduler.timesteps):
        if sampler == "ddpm":
            output = noise_prediction(velocity, x, scheduler.alphas_cumprod[timestep].item())
        else:
            output = velocity(x, scheduler.sigmas[index].item())
        x = scheduler.step(output, timestep, x, return_dict=False, **extra)[0]
        if on_step is not None:
            on_step()
    return x[rows]
