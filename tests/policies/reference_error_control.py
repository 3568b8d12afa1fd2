"""Error control as a plain loop over blocks: what the compiled steps are tested against.

Written from the rule in docs/how-it-works.md, without the compiler: one stream of `tests.models.TinyDiTMoE`, whose
change over the stack is held or forecast along a straight line. A new generation calls `begin`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tests.models import TinyDiTMoE


@dataclass
class Controlled:
    """One stream. `step` returns whether it was full, and the model's output.

    bound: max_error
    forecast: along a straight line through the last two full steps; else values are held
    fault: plants one: "first sample", "last gap forgotten", "other order", "unweighted", "one step late",
        "unbounded", "undamped"
    """

    model: TinyDiTMoE
    bound: float
    forecast: bool = True
    corrector: bool = False
    fault: str = ""
    margins: list[float] = field(default_factory=list)
    """How far each step was from the next full one, in steps: rounding must not decide."""

    def begin(self, planned: list[int], end: int) -> None:
        """A generation whose full steps would be those planned, of `end` steps, without error control."""
        self.planned, self.mean = [*planned, end], end / len(planned)
        self.number, self.fulls, self.target, self.length = 0, list[int](), 0.0, 1.0
        self.known: list[tuple[float, Tensor]] = []
        self.passed: list[float] = []
        self.errors: list[float] = []

    def place(self, step: float) -> float:
        """Among the planned steps, in proportion between two of them."""
        return float(np.interp(step, self.planned, range(len(self.planned))))

    @torch.no_grad()
    def step(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[bool, Tensor]:
        h, c = self.model.embed_inputs(x, t, y)
        time, full = float(t[0]), not self.fulls or self.is_due()
        guess = self.model.finish(h + self.cached(time), c) if self.known else None
        if not full:
            assert guess is not None
            self.passed.append(time)
            self.number += 1
            return False, guess
        out = h
        for block in self.model.blocks:
            out = block(out, c)
        change, out = out - h, self.model.finish(out, c)
        result = out if guess is None else self.corrected(out, guess, time)
        self.known, self.passed = [(time, change), *self.known][: 2 if self.forecast else 1], []
        self.plan_next(None if guess is None else self.error(out, guess))
        self.number += 1
        return True, result

    def is_due(self) -> bool:
        late = 1 if self.fault == "one step late" else 0
        # The step that is nearest to the target.
        ahead = self.place(self.number - late + 0.5) - self.target
        self.margins.append(abs(ahead) * self.mean)
        return ahead > 0

    def error(self, out: Tensor, guess: Tensor) -> float:
        each = [float((v - g).norm() / v.norm()) for v, g in zip(out, guess, strict=True)]
        return each[0] if self.fault == "first sample" else max(each)

    def plan_next(self, error: float | None) -> None:
        """Where the full step after this one should be."""
        now, number = self.place(self.number), self.number
        order = int(self.forecast)
        if self.fulls:
            done, gap = now - self.place(self.fulls[-1]), number - self.fulls[-1]
            at = self.target if self.place(number - 0.5) <= self.target <= self.place(number + 0.5) else now
        else:
            done, gap, at = 0.0, 0, 0.0
        length = self.length
        if len(self.fulls) > order and error is not None:
            self.errors.append(error)
            counted = error if self.fault == "unweighted" else error * gap / self.mean
            power = 1 / (order + (3 if self.fault == "other order" else 2))
            most = 9.0 if self.fault == "unbounded" else 2.0
            longer = (1.0 if self.fault == "last gap forgotten" else done) * (self.bound / counted) ** power
            length = min(most, max(1 / most, longer))
            if self.fault != "undamped":
                length = (length * self.length) ** 0.5
        self.length, self.target = length, at + length
        self.fulls.append(number)

    def corrected(self, out: Tensor, guess: Tensor, time: float) -> Tensor:
        if not self.corrector or not self.passed:
            return out
        gain, ends = 0.0, [*self.passed[1:], time]
        for now, end in zip(self.passed, ends, strict=True):
            share = (end - now) / (time - self.passed[-1])
            for at, _ in self.known:
                share *= (now - at) / (time - at)
            gain += share
        return out + gain * (out - guess)

    def cached(self, time: float) -> Tensor:
        (at, change), *before = self.known
        if not before:
            return change
        return change + (change - before[0][1]) * (time - at) / (at - before[0][0])
