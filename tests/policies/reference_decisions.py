"""TeaCache, DBCache and MagCache as plain loops over blocks: what the compiled policies are tested against.

Written from the methods' public code and papers, without the compiler. Each simulates one stream of
`tests.models.TinyDiTMoE`; a new generation calls `begin`. What a method leaves open, this file decides:

- The first step of a generation is full, and the last one where `steps` says how many there are.
- TeaCache compares with the step before, block cache with the last full step, on the whole batch.
- `late` plants a fault: each decision is made of the value of the step before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from examples.dit import modulate
from tests.models import TinyDiTMoE

EPS = 1e-6


def relative(now: Tensor, before: Tensor) -> float:
    return float((now - before).abs().mean() / (before.abs().mean() + EPS))


@dataclass
class Simulation:
    """One stream. `step` returns whether it was full, and the model's output."""

    model: TinyDiTMoE
    threshold: float
    warmup: int = 0
    most: int | None = None
    forecast: bool = False
    corrector: bool = False
    late: bool = False
    steps: int | None = None
    margins: list[float] = field(default_factory=list)
    """How far each decision was from the threshold, relative to it: rounding must not decide."""

    def begin(self, steps: int | None) -> None:
        self.steps, self.number, self.reused, self.last_signal = steps, 0, 0, 0.0
        self.passed: list[float] = []
        self.known: list[tuple[float, Tensor]] = []
        """Time and cached change of the last two full steps, the newest first."""
        self.restart()

    def step(self, x: Tensor, t: Tensor, y: Tensor, certain: bool = True) -> tuple[bool, Tensor]:
        h, c = self.model.embed_inputs(x, t, y)
        signal = self.signal(h, c)
        judged, self.last_signal = (self.last_signal if self.late else signal), signal
        if not certain:
            self.known, self.passed = [], []
        forced = not certain or self.number == 0 or self.number + 1 == self.steps or self.number < self.warmed_up()
        forced = forced or (self.most is not None and self.reused >= self.most)
        full = forced or self.exceeds(judged, float(t[0]))
        if full:
            self.reused = 0
            self.restart()
        else:
            self.reused += 1
        self.number += 1
        return full, self.output(full, h, c, float(t[0]))

    def output(self, full: bool, h: Tensor, c: Tensor, time: float) -> Tensor:
        gain, guess = 0.0, None
        if not full:
            self.passed.append(time)
            return self.model.finish(self.reuse(h, c, time), c)
        if self.corrector and self.passed:  # held values: errors that grow in proportion to the time since
            since, ends = self.known[0][0], [*self.passed[1:], time]
            lengths = [(end - now) / (time - self.passed[-1]) for now, end in zip(self.passed, ends, strict=True)]
            gain = sum((now - since) / (time - since) * w for now, w in zip(self.passed, lengths, strict=True))
            guess = self.model.finish(self.reuse(h, c, time), c)
        self.passed = []
        out = self.model.finish(self.run_full(h, c, time), c)
        return out if guess is None else out + gain * (out - guess)

    # --- what the methods share -----------------------------------------------------------------------------

    def warmed_up(self) -> float:
        return self.warmup

    def judge(self, error: float) -> bool:
        self.margins.append(abs(error - self.threshold) / self.threshold)
        return error >= self.threshold

    def keep(self, change: Tensor, time: float) -> None:
        self.known = [(time, change), *self.known][:2]

    def cached(self, time: float) -> Tensor:
        (at, change), *before = self.known
        if not self.forecast or not before:
            return change
        return change + (change - before[0][1]) * (time - at) / (at - before[0][0])

    # --- the whole stack ------------------------------------------------------------------------------------

    def run_full(self, h: Tensor, c: Tensor, time: float) -> Tensor:
        out = h
        for block in self.model.blocks:
            out = block(out, c)
        self.keep(out - h, time)
        return out

    def reuse(self, h: Tensor, c: Tensor, time: float) -> Tensor:
        return h + self.cached(time)

    # --- what differs ---------------------------------------------------------------------------------------

    def signal(self, h: Tensor, c: Tensor) -> float:
        raise NotImplementedError

    def exceeds(self, signal: float, time: float) -> bool:
        raise NotImplementedError

    def restart(self) -> None:
        pass


@dataclass
class TeaCache(Simulation):
    polynomial: tuple[float, ...] = (1.0, 0.0)
    before: Tensor | None = None
    total: float = 0.0

    def signal(self, h: Tensor, c: Tensor) -> float:
        block = self.model.blocks[0]
        shift, scale, *_ = block.modulation(c)
        m = modulate(block.norm1(h), shift, scale)
        moved = relative(m, self.before) if self.before is not None else 0.0
        self.before = m
        return moved

    def exceeds(self, signal: float, time: float) -> bool:
        powers = range(len(self.polynomial) - 1, -1, -1)
        self.total += sum(a * signal**power for a, power in zip(self.polynomial, powers, strict=True))
        return self.judge(self.total)

    def restart(self) -> None:
        self.total = 0.0


@dataclass
class BlockCache(Simulation):
    first: int = 1
    last: int = 0
    now: Tensor | None = None
    at_full: Tensor | None = None

    def signal(self, h: Tensor, c: Tensor) -> float:
        out = h
        for block in self.model.blocks[: self.first]:
            out = block(out, c)
        self.now = out - h
        return relative(self.now, self.at_full) if self.at_full is not None else 0.0

    def exceeds(self, signal: float, time: float) -> bool:
        return self.judge(signal)

    def run_full(self, h: Tensor, c: Tensor, time: float) -> Tensor:
        self.at_full = self.now
        begun = h + self.now
        out = begun
        for block in self.model.blocks[self.first : len(self.model.blocks) - self.last]:
            out = block(out, c)
        self.keep(out - begun, time)
        return self.finished(out, c)

    def reuse(self, h: Tensor, c: Tensor, time: float) -> Tensor:
        return self.finished(h + self.now + self.cached(time), c)

    def finished(self, out: Tensor, c: Tensor) -> Tensor:
        for block in self.model.blocks[len(self.model.blocks) - self.last :]:
            out = block(out, c)
        return out


@dataclass
class MagCache(Simulation):
    ratios: tuple[float, ...] | None = None
    measured: dict[tuple[float, float], float] = field(default_factory=dict)

    def begin(self, steps: int | None) -> None:
        super().begin(steps)
        self.time_before: float | None = None
        self.full_before = False
        self.norms: Tensor | None = None

    def step(self, x: Tensor, t: Tensor, y: Tensor, certain: bool = True) -> tuple[bool, Tensor]:
        before = self.norms
        full, out = super().step(x, t, y, certain)
        if full and self.full_before:
            assert before is not None and self.norms is not None and self.time_before is not None
            self.measured[self.time_before, float(t[0])] = float((self.norms / before).mean())
        self.time_before, self.full_before = float(t[0]), full
        return full, out

    def signal(self, h: Tensor, c: Tensor) -> float:
        return 0.0

    def run_full(self, h: Tensor, c: Tensor, time: float) -> Tensor:
        out = super().run_full(h, c, time)
        self.norms = (out - h).norm(dim=-1)
        return out

    def warmed_up(self) -> float:
        known = len(self.ratios) if self.ratios else len(self.measured)
        return int(0.2 * (self.steps or known))

    def exceeds(self, signal: float, time: float) -> bool:
        if self.ratios is None:
            ratio = self.measured.get((self.time_before, time))
        else:
            steps, known = self.steps or len(self.ratios), len(self.ratios)
            places = np.round(np.arange(steps) * (known - 1) / (steps - 1)).astype(int)
            ratio = self.ratios[places[self.number]] if self.number < steps else None
        if ratio is None:
            return True
        self.product *= ratio
        self.error += abs(1 - self.product)
        return self.judge(self.error)

    def restart(self) -> None:
        self.product, self.error = 1.0, 0.0


def trajectory_step(x: Tensor, cond: Tensor, uncond: Tensor, steps: int) -> Tensor:
    """The next picture of an Euler sampler with guidance 2."""
    return x - (uncond + 2 * (cond - uncond)) / steps


def times_of(steps: int) -> list[float]:
    return [1 - number / steps for number in range(steps)]


def time_of(x: Tensor, time: float) -> Tensor:
    return torch.full((len(x),), time)
