"""MagCache: how the size of the change over the block stack goes from step to step says how long it may be reused.

The ratio of two successive changes' sizes, mean over tokens of |r_t| / |r_(t-1)|, hardly depends on the picture. The
product of these ratios since the last full step is that of this step's change to the cached one, and its distance
from 1 is the error of reusing that. While the errors since the last full step add up to no more than the threshold,
the change is reused.

The ratios are measured once for a model and its timesteps: in the first generation, which runs uncached, or before.

Source: MagCache (Ma et al., 2025), section 3, with its defaults (threshold 0.06, retention 0.2, at most 3 in a row).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeca_compile.options import Options
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.kinds import CacheSpec, Role
from moeca_compile.passes.rewrite.probe import EPS, Probe
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies import stack
from moeca_compile.policies.criterion import Criterion, Decides, Memory, Signal, StepAt
from moeca_compile.policies.policy import DECIDING, Policy

_BEFORE = "norms_before"
_LONGEST = "longest"

_GIVE_THEM = (
    "report(model).magnitude_ratios has them after a generation: pass them as the option magnitude_ratios (the "
    "numbers, or a JSON file with them) to reuse from the first generation on"
)
MEASURES = (
    "recipe 'magcache' has no magnitude_ratios, so it measures them: this generation runs uncached, and the next "
    f"ones at these timesteps reuse. {_GIVE_THEM}"
)
MEASURES_MORE = (
    "recipe 'magcache' has not measured the magnitude ratios at these timesteps, as after another number of steps. "
    f"Such steps run uncached, and are measured. {_GIVE_THEM}"
)
_MOST = 4096
"""So many ratios are kept: where timesteps are random, no two generations share any."""


def probe(options: Options, regions: Regions) -> Probe | None:
    """After a full step: the ratio of the change's size to that of the full step before. Nothing if all are given."""
    if options.magnitude_ratios is not None:
        return None
    stacks = dict(zip(regions.stacks, stack.names_of("stack", len(regions.stacks)), strict=True))
    name, (_, last) = stacks[regions.main_stack], regions.main_stack

    def signal(step: Step) -> Tensor:
        norms, before = step.state[name].to(torch.float32).norm(dim=-1), step.state[_BEFORE]
        step.updates[_BEFORE] = norms
        return (norms / (before + EPS)).mean()

    norms = CacheSpec(_BEFORE, shape_of(last)[:-1], torch.float32, Role.STATISTIC)
    return Probe(signal, (norms,), after=True)


class Magnitudes(Criterion):
    """The errors that the ratios foresee, added up since the last full step, exceed the threshold.

    Measured ratios are kept by the times of the two steps, so that a step is never judged by another one's ratio.
    """

    def __init__(self, options: Options, memory: Memory) -> None:
        super().__init__(options, memory)
        self.ratio, self.error = 1.0, 0.0
        self.own: list[Signal] = []
        """Those that this generation has measured."""
        self.lacking = MEASURES_MORE if memory else MEASURES

    def warmup(self, at: StepAt) -> float:
        return int(self.options.retention * self._steps(at))

    def exceeds(self, at: StepAt, signal: Signal) -> bool:
        ratio = self._ratio(at)
        if ratio is None:
            return True
        self.ratio *= ratio
        self.error += abs(1 - self.ratio)
        return not self.error <= self.options.reuse_threshold  # so that NaN is full

    def restart(self) -> None:
        self.ratio, self.error = 1.0, 0.0

    def measured(self, at: StepAt, signal: Signal) -> None:
        if self.before is None or not self.full_before:
            return
        if len(self.memory) > _MOST:
            self.memory.clear()
        self.memory[self.before.time, at.time] = signal
        self.own.append(signal)
        if len(self.own) == at.number and at.number >= len(self.memory.get(_LONGEST, ())):
            self.memory[_LONGEST] = self.own

    def _steps(self, at: StepAt) -> int:
        """How many steps the generation has; where nothing says, as many as there are ratios."""
        given = self.options.magnitude_ratios
        return at.steps or (len(given) if given is not None else len(self.memory))

    def _ratio(self, at: StepAt) -> float | None:
        given = self.options.magnitude_ratios
        if given is not None:
            steps = self._steps(at)
            return given[_nearest(at.number, steps, len(given))] if at.number < steps else None
        assert self.before is not None, "a stream's first step is full"
        measured: Signal | None = self.memory.get((self.before.time, at.time))
        if measured is None:
            self.remark = self.lacking
        return measured() if measured is not None else None


def _nearest(number: int, steps: int, known: int) -> int:
    """The ratio for a step, where ratios are known for another number of steps."""
    return round(number * (known - 1) / (steps - 1)) if steps > 1 else known - 1


def measured_ratios(memory: Memory) -> list[float]:
    """A ratio for each step of the longest generation that was measured whole; that of the first step is 1."""
    longest = memory.get(_LONGEST, ())
    return [1.0, *(signal() for signal in list(longest))] if longest else []


POLICY = Policy(
    reuses="the change over the whole block stack, while its size is foreseen to stay alike (MagCache)",
    recipes={"magcache": {"reuse_threshold": 0.06, "max_reused": 3}},
    options=DECIDING | {"magnitude_ratios", "retention"},
    declare=stack.declare,
    needs="a residual stream that runs through all blocks",
    decides=Decides(Magnitudes, probe, measured_ratios),
)
