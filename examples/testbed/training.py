"""Training of a testbed's model: a rectified flow, an average of the weights, and a state to resume from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from examples.testbed.model import MoEDiT

LABEL_DROPOUT = 0.1
BALANCE_WEIGHT = 0.02
EMA_DECAY = 0.999
WARMUP_STEPS = 200
LAST_RATE = 0.01
FALLING_SHARE = 0.2

Tensors = list[Tensor] | tuple[Tensor, ...]
Draw = Callable[[int], tuple[Tensor, Tensor]]
"""A number of images -> so many random images [B, C, H, W] and their labels [B]."""


def cosine(step: int, steps: int) -> float:
    """Factor on the peak rate: linear warm-up, then a cosine down to 1%."""
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def hold(step: int, steps: int) -> float:
    """Factor on the peak rate: linear warm-up, 1, and in the last fifth of the steps a line down to 1%.

    Until that last fifth it does not depend on the number of steps, so a run that is resumed may be given another.
    """
    falling = max(1, round(FALLING_SHARE * steps))
    return min(1.0, (step + 1) / WARMUP_STEPS, LAST_RATE + (1 - LAST_RATE) * (steps - step) / falling)


SCHEDULES: dict[str, Callable[[int, int], float]] = {"cosine": cosine, "hold": hold}


class ResumeError(Exception):
    """There is no state to go on from, or it is that of another run; the message says which and what to do."""


@dataclass(frozen=True)
class Plan:
    """How a model is trained: so many steps of ``batch`` images, with a peak learning rate ``lr``."""

    steps: int
    batch: int
    lr: float
    schedule: str
    half: bool
    """Matrix products in bfloat16."""
    seed: int = 0


def flow_loss(model: MoEDiT, images: Tensor, labels: Tensor, half: bool = True) -> Tensor:
    """Rectified flow: x_t = (1 - t) x_0 + t noise, velocity = noise - x_0; t is logit-normal."""
    noise = torch.randn_like(images)
    t = torch.sigmoid(1.2 * torch.randn(len(images), device=images.device))
    x_t = torch.lerp(images, noise, t[:, None, None, None])
    dropped = torch.rand(len(labels), device=labels.device) < LABEL_DROPOUT
    y = torch.where(dropped, model.y_embedder.null_class, labels)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        velocity = model(x_t, t, y)
    return F.mse_loss(velocity.float(), noise - images)


def balance_loss(model: MoEDiT) -> Tensor:
    losses = [layer.gate.balance_loss for layer in model.moe_layers()]
    return torch.stack([loss for loss in losses if loss is not None]).mean()


def ema_update(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
    """Moving average of the weights. Its decay is smaller at first, so that early checkpoints are usable."""
    decay = min(EMA_DECAY, (1 + int(count)) / (10 + int(count)))
    torch._foreach_lerp_(averaged, current, 1 - decay)


class Training:
    """A model in training: ``model``, the moving average of its weights ``averaged``, and the step that comes next.

    ``save`` and ``load`` keep all of it, with the random numbers' state: a resumed run goes on as if never stopped.
    """

    def __init__(self, model: MoEDiT, plan: Plan) -> None:
        self.model, self.plan, self.step = model.train(), plan, 0
        self.ema = AveragedModel(model, multi_avg_fn=ema_update)
        self.optimizer = torch.optim.AdamW(model.parameters(), plan.lr, betas=(0.9, 0.99), weight_decay=0, fused=True)

    @property
    def averaged(self) -> MoEDiT:
        return cast(MoEDiT, self.ema.module)

    def run(self, draw: Draw) -> Iterator[Tensor]:
        """Do the steps that are left; yields the detached flow loss of each."""
        while self.step < self.plan.steps:
            yield self._one(*draw(self.plan.batch))

    def _one(self, images: Tensor, labels: Tensor) -> Tensor:
        plan, rate = self.plan, SCHEDULES[self.plan.schedule](self.step, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr * rate
        loss = flow_loss(self.model, images, labels, plan.half)
        (loss + BALANCE_WEIGHT * balance_loss(self.model)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.model)
        self.step += 1
        return loss.detach()

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {name: part.state_dict() for name, part in self._parts()}
        random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        partial = path.with_suffix(".partial")  # so that a stop while writing loses nothing
        torch.save({"step": self.step, "random": random, "plan": asdict(self.plan), **parts}, partial)
        partial.replace(path)

    def load(self, path: Path) -> bool:
        """Go on from a saved state; returns whether this run would have come to that state by itself.

        Another number of steps is allowed: it would not have, where learning rates until there had been others.
        Raises ResumeError where there is no state, or it is of another plan.
        """
        if not path.is_file():
            raise ResumeError(f"there is no state at {path} to go on from; start without --resume")
        state = torch.load(path, weights_only=True)
        before, now, factor = Plan(**state["plan"]), self.plan, SCHEDULES[self.plan.schedule]
        if replace(before, steps=now.steps) != now:
            raise ResumeError(f"{path} was made by {before}, which is not {now}; give the same arguments")
        for name, part in self._parts():
            part.load_state_dict(state[name])
        self.step = state["step"]
        torch.set_rng_state(state["random"]["cpu"])
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
        same = all(factor(step, before.steps) == factor(step, now.steps) for step in range(self.step))
        return same or self.step >= now.steps

    def _parts(self) -> Iterator[tuple[str, nn.Module | torch.optim.Optimizer]]:
        yield from (("model", self.model), ("ema", self.ema), ("optimizer", self.optimizer))
