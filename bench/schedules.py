"""Where full steps should sit: schedules of the default recipe compared, and the error that each gap leaves.

python -m bench.schedules                                     # all testbeds, N = 3, 4, 5, 6
python -m bench.schedules --testbed mnist --every 5 --gaps --images 20

What `auto` computes is done here in plain PyTorch, without capture and compilation, so that a schedule takes seconds;
tests/bench/test_schedules.py holds it against the backend's pictures. Printed is the PSNR to the uncached pictures of
the same seeds: median, mean with its standard error, worst image. With --gaps each gap of a schedule is cached alone,
while all other steps are full.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from statistics import mean, median, stdev

import torch
from torch import Tensor

from bench.study import TESTBEDS
from examples.testbed import metrics, sampling
from examples.testbed.arguments import guidance_scale, whole_number
from examples.testbed.model import MoEDiT
from examples.testbed.testbed import Testbed
from moeca_compile.config import MoecaConfig
from moeca_compile.policies.forecast import HALF, LINEAR, Rule
from moeca_compile.runtime.corrector import gain
from moeca_compile.runtime.schedule import CURVED, power_steps

BATCH = 20
EXPONENT = MoecaConfig().schedule_exponent
SCHEDULES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "even": lambda steps, full: power_steps(steps, full, 1.0),
    "power 1.15": lambda steps, full: power_steps(steps, full, 1.15),
    "power 1.3": lambda steps, full: power_steps(steps, full, 1.3),
    "power 1.45": lambda steps, full: power_steps(steps, full, EXPONENT),
    "tapered 1.45": lambda steps, full: CURVED["tapered"](steps, full, EXPONENT),
}


class Cached:
    """The model with the change over its blocks extrapolated between full steps, and corrected at them.

    Args:
        model: the model.
        full: the numbers of the full steps.
        kept: those whose change forecasts may read; None for all.
        corrects: whether full steps make up for the steps before them.
        slope: how much of the slope the forecast believes.
    """

    def __init__(
        self,
        model: MoEDiT,
        full: Collection[int],
        kept: Collection[int] | None = None,
        corrects: bool = True,
        slope: float = 1.0,
    ) -> None:
        self.model, self.full, self.kept, self.corrects = model, full, full if kept is None else kept, corrects
        self.rule = Rule(LINEAR.order, LINEAR.older, LINEAR.slots, slope=slope)
        self.step = 0
        self.at: list[float] = []
        """When the last full steps were, the newest first."""
        self.changes: list[Tensor] = []
        """The change over the blocks [B, T, D] at each of them."""
        self.passed: list[float] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        now, number, model = t[0].item(), self.step, self.model
        self.step += 1
        tokens = model.x_embedder(model.patches(x)) + model.pos_embed  # [B, T, D]
        c = model.t_embedder(t) + model.y_embedder(y)
        if number not in self.full:
            self.passed.append(now)
            return self._head(tokens + self._forecast(now), c)
        last = tokens
        for block in model.blocks:
            last = block(last, c)
        velocity = self._head(last, c)
        weight = gain(self.at, self.passed, now) if self.corrects and self.at else 0.0
        if weight:
            velocity = velocity + weight * (velocity - self._head(tokens + self._forecast(now), c))
        self.passed = []
        if number in self.kept:
            self.changes = [last - tokens, *self.changes][: self.rule.slots]
            self.at = [now, *self.at][: self.rule.slots]
        return velocity

    def _forecast(self, now: float) -> Tensor:
        weights = self.rule.weights(self.at, now)
        return torch.stack([weight * change for weight, change in zip(weights, self.changes, strict=True)]).sum(0)

    def _head(self, tokens: Tensor, c: Tensor) -> Tensor:
        return self.model.image(self.model.final_layer(tokens, c))


class Pictures:
    """Pictures of one model by schedules; of each batch of 20 the noise has a seed of its own."""

    def __init__(self, testbed: Testbed, images: int, steps: int, guidance: float, sampler: str) -> None:
        self.testbed, self.model = testbed, testbed.load_model()
        self.images, self.steps, self.guidance, self.sampler = images, steps, guidance, sampler
        self.uncached = self.by(range(steps))

    def by(self, full: Collection[int], kept: Collection[int] | None = None) -> Tensor:
        """[images, C, S, S] with these full steps."""
        noisy, found = self.sampler == "ddpm", []
        for seed, start in enumerate(range(0, self.images, BATCH)):
            labels = torch.arange(min(BATCH, self.images - start)) % 10
            cached = Cached(self.model, full, kept, not noisy, slope=HALF if noisy else 1.0)
            how = {"steps": self.steps, "guidance": self.guidance, "sampler": self.sampler, "seed": seed}
            found.append(self.testbed.generate(cached, labels, **how))
        return torch.cat(found)

    def scores(self, full: Collection[int], kept: Collection[int] | None = None) -> list[float]:
        """The PSNR of each picture to the uncached one."""
        pairs = zip(self.by(full, kept), self.uncached, strict=True)
        return [metrics.psnr(picture[None], wished[None]) for picture, wished in pairs]

    def by_gap(self, full: Sequence[int]) -> Iterator[tuple[int, int, list[float]]]:
        """The first and the last full step of each gap, and the scores where it alone is cached.

        All other steps are full, but forecasts read those of the schedule alone.
        """
        for index, (start, end) in enumerate(zip(full, [*full[1:], self.steps], strict=True)):
            if end - start > 1:
                yield start, end, self.scores({*range(start + 1), *range(end, self.steps)}, full[: index + 1])


def summary(scores: Sequence[float]) -> str:
    error = stdev(scores) / len(scores) ** 0.5
    return f"median {median(scores):5.1f}   mean {mean(scores):5.1f} ± {error:.1f}   worst {min(scores):5.1f}"


# --- command line ---------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--testbed", action="append", choices=list(TESTBEDS), help="several times (all)")
    parser.add_argument("--every", action="append", type=whole_number(1), help="N, several times (3, 4, 5, 6)")
    parser.add_argument("--schedule", action="append", choices=list(SCHEDULES), help="several times (all)")
    parser.add_argument("--images", type=whole_number(2), default=40, help="pictures (40)")
    parser.add_argument("--steps", type=whole_number(2, 1000), default=50, help="sampling steps (50)")
    parser.add_argument("--guidance", type=guidance_scale, default=1.5, help="classifier-free guidance (1.5)")
    parser.add_argument("--sampler", choices=sampling.SAMPLERS, default="euler", help="(euler)")
    parser.add_argument("--gaps", action="store_true", help="what each gap alone costs")
    parser.add_argument("--threads", type=whole_number(1), default=1, help="threads of torch (1)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for name in args.testbed or TESTBEDS:
        pictures = Pictures(TESTBEDS[name], args.images, args.steps, args.guidance, args.sampler)
        for every in args.every or (3, 4, 5, 6):
            for schedule in args.schedule or SCHEDULES:
                full = SCHEDULES[schedule](args.steps, -(-args.steps // every))
                print(f"{name}, N = {every}, {schedule:<13} {summary(pictures.scores(full))}", flush=True)
                for start, end, scores in pictures.by_gap(full) if args.gaps else ():
                    print(f"    steps {start:3d} to {end:3d}: {summary(scores)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
