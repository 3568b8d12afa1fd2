"""Run policies side by side on one model: paired timings, and every policy's images from the same seeds.

Here a *policy* is a way to sample images: a compiled model, a sampler and a number of steps.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import moeca_compile
from examples.machine import environment as environment  # re-exported
from examples.machine import private_copy as private_copy
from examples.testbed import metrics, ranks
from examples.testbed.classifier import Classifier
from examples.testbed.sampling import DETERMINISTIC, VelocityModel, generate
from moeca_compile.config import RECIPES

BASELINE = "torch.compile"
UNCACHED = "none"
UNCACHED_WARMUP = 8


@dataclass(frozen=True)
class Setting:
    """One generation: ``batch`` images in ``steps`` steps. Repeat r has seed ``seed + r``."""

    shape: tuple[int, int, int]
    """Of one image: (channels, side, side)."""
    batch: int = 20
    steps: int = 50
    guidance: float = 1.5
    sampler: str = "euler"
    seed: int = 0
    repeats: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the backend, for recipes that cache."""
    lowering: str = "inductor"
    """"eager" compiles nothing: all graphs run op by op, for a try."""
    processes: int = 1
    """Ranks that share the images."""

    @property
    def labels(self) -> Tensor:
        """The requested classes, 0 to 9 repeatedly: [batch]."""
        return torch.arange(self.batch) % 10


@dataclass
class Policy:
    """A way to sample images, with its measurements. ``flops_speedup`` is relative to the uncached run."""

    name: str
    model: VelocityModel
    steps: int
    sampler: str
    flops_speedup: float = 1.0
    warmup_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)  # one entry a repeat
    images: list[Tensor] = field(default_factory=list)  # one batch a repeat


@dataclass(frozen=True)
class Row:
    """A policy's line of the table. Speed-ups are medians over the repeats of paired ratios."""

    policy: str
    steps: int
    sampler: str
    seconds: float
    warmup_seconds: float
    speedup_over_compile: float
    speedup_over_uncached: float
    flops_speedup: float
    psnr: float
    ssim: float
    agreement: float
    frechet: float


def timed_generation(
    policy: Policy,
    setting: Setting,
    seed: int,
    device: torch.device,
    on_step: Callable[[], None],
) -> tuple[Tensor, float]:
    """Images of this rank's rows, and wall-clock seconds of one generation."""
    labels = setting.labels.to(device)
    start = time.perf_counter()
    with moeca_compile.generation(steps=policy.steps):
        images = generate(
            policy.model,
            labels,
            shape=setting.shape,
            steps=policy.steps,
            guidance=setting.guidance,
            sampler=policy.sampler,
            seed=seed,
            rows=ranks.own_rows(setting.batch),
            on_step=on_step,
        )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images, time.perf_counter() - start


def compiled_policy(model: nn.Module, name: str, setting: Setting) -> Policy:
    """``model`` under plain torch.compile (``BASELINE``) or a recipe. It is compiled at the first run."""
    own = private_copy(model)
    if name == BASELINE:
        compiled = torch.compile(own, backend=setting.lowering)
    else:
        told = "deterministic" if setting.sampler in DETERMINISTIC else "stochastic"
        own_options = {"sampler": told} if "sampler" in RECIPES[name].options else {}
        options = {} if name == UNCACHED else {**own_options, **setting.options}
        chosen = {"recipe": name, "lowering": setting.lowering, **options}
        compiled = torch.compile(own, backend="moeca", options=chosen)
    return Policy(name, compiled, setting.steps, setting.sampler)


def warmup_steps(policy: Policy) -> int:
    """How many steps compile everything. Without a cache all steps are alike, so a few are enough."""
    return min(policy.steps, UNCACHED_WARMUP) if policy.name in (BASELINE, UNCACHED) else policy.steps


def warm_up(policy: Policy, setting: Setting, device: torch.device, on_step: Callable[[], None]) -> None:
    """Compile every kind of step, one rank after the first. A recipe needs a whole generation, which also gives its
    FLOPs."""
    short = replace(policy, steps=warmup_steps(policy))
    with ranks.first_one_first():
        _, policy.warmup_seconds = timed_generation(short, setting, setting.seed, device, on_step)
    if policy.name != BASELINE:
        flops = moeca_compile.report(policy.model).to_dict()["flops"]
        policy.flops_speedup = ranks.mean(float(flops["speedup"]))


def step_reductions(baseline: Policy, target: Policy, setting: Setting) -> Iterator[Policy]:
    """The uncached model with as many FLOPs as ``target``: fewer steps of its sampler, and of a better solver."""
    steps = max(1, round(setting.steps / target.flops_speedup))
    speedup = setting.steps / steps
    yield Policy(f"fewer steps ({steps})", baseline.model, steps, setting.sampler, speedup)
    if setting.sampler in DETERMINISTIC and setting.sampler != "multistep":
        yield Policy(f"multistep solver ({steps})", baseline.model, steps, "multistep", speedup)


def run_paired(
    policies: list[Policy],
    setting: Setting,
    device: torch.device,
    on_step: Callable[[str], None],
) -> None:
    """Run all policies once, then all again, and so on, so that drift of the machine affects all of them alike.

    A generation ends when the last rank ends. ``on_step`` gets the policy's name after each sampling step.
    """
    for repeat in range(setting.repeats):
        for policy in policies:
            advance = partial(on_step, policy.name)
            ranks.wait_for_all()
            images, seconds = timed_generation(policy, setting, setting.seed + repeat, device, advance)
            policy.images.append(ranks.gathered(images))
            policy.seconds.append(ranks.longest(seconds))


def paired_speedup(reference: Policy, policy: Policy) -> float:
    return median(slow / fast for slow, fast in zip(reference.seconds, policy.seconds, strict=True))


def make_rows(policies: list[Policy], setting: Setting, classifier: Classifier, real: Tensor) -> list[Row]:
    """The table's rows. PSNR and SSIM are to the baseline's images, Frechet distance to ``real`` [*, C, H, W]."""
    by_name = {policy.name: policy for policy in policies}
    baseline, uncached = by_name[BASELINE], by_name[UNCACHED]
    reference = torch.cat(baseline.images)
    labels = setting.labels.repeat(setting.repeats)
    rows = []
    for policy in policies:
        images = torch.cat(policy.images)
        rows.append(
            Row(
                policy=policy.name,
                steps=policy.steps,
                sampler=policy.sampler,
                seconds=median(policy.seconds),
                warmup_seconds=policy.warmup_seconds,
                speedup_over_compile=paired_speedup(baseline, policy),
                speedup_over_uncached=paired_speedup(uncached, policy),
                flops_speedup=policy.flops_speedup,
                psnr=metrics.psnr(images, reference),
                ssim=metrics.ssim(images, reference),
                agreement=metrics.agreement(classifier, images, labels),
                frechet=metrics.frechet_distance(classifier, images, real),
            )
        )
    return rows


def as_json(rows: list[Row], setting: Setting, where: dict[str, str | int]) -> dict[str, object]:
    return {"environment": where, "setting": asdict(setting), "rows": [asdict(row) for row in rows]}
