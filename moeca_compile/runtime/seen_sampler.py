"""Whether the sampler of a request draws noise between its steps: seen from its first pictures.

A sampler without noise makes each picture by a sum of the pictures and the model's outputs before it, with weights
that depend on the time alone: Euler, Heun, DPM-Solver, DDIM and linear multistep methods, guided or not. So the next
picture lies in the span of what was before, but for rounding. Fresh noise does not, as hardly any of it can be
explained by so few numbers. Nothing is said of a sampler that does anything else, such as clipping what it predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeca_compile.runtime.continuation import compared_elements
from moeca_compile.runtime.late import LateCopy, recording

_LOOKED_AT = 4
"""The first steps of a request, whose pictures and outputs are kept for it."""
_BEFORE = 3
"""So many steps back a sampler may look."""
_SHARE_OF_MOVE = 0.25
"""What is not explained may be this part of the picture's move, at most. With noise it is most of that."""
_ROUNDING = 1e-4
"""And this part of the picture, or twice the rounding of its dtype: a sampler may compute in another dtype."""
_PER_WEIGHT = 4
"""So many elements must be explained by each weight."""


class SeenSampler:
    """The first pictures of a request and what the model made of them, and what they say."""

    __slots__ = ("_answer", "_device", "_rounding", "_steps")

    def __init__(self) -> None:
        self._steps: list[_Step] | None = []
        """None once the answer is known."""
        self._answer: bool | None = None
        self._rounding, self._device = _ROUNDING, torch.device("cpu")

    def note(self, number: int, picture: Any, outputs: Sequence[Any]) -> None:
        """See a call.

        Args:
            number: of its step. Calls at one step on one picture are the parts of a guided output.
            picture: (B, ...), which the sampler changes; outputs: those of the model.
        """
        if self._steps is None or len(self._steps) < number or number >= _LOOKED_AT:
            return
        output = _of_picture(picture, outputs)
        if output is None or recording(picture.device):
            return
        chosen = _beside_the_first(len(picture))
        values = LateCopy(torch.stack((compared_elements(picture)[chosen], compared_elements(output)[chosen])))
        self._device = picture.device
        self._rounding = max(self._rounding, 2 * torch.finfo(picture.dtype).eps)
        if number == len(self._steps):
            self._steps.append(_Step())
        self._steps[number].calls.append(values)

    @property
    def deterministic(self) -> bool | None:
        """True where two steps in a row were made without noise; None where that is not seen (yet).

        The first one who asks once there are enough waits for the device, if it has not come that far: what is
        corrected must not depend on how fast it is.
        """
        if self._steps is None or len(self._steps) < _BEFORE or recording(self._device):
            return self._answer
        self._answer = True if self._without_noise([step.values() for step in self._steps]) else None
        self._steps = None
        return self._answer

    def _without_noise(self, steps: Sequence[tuple[Tensor, list[Tensor]]]) -> bool:
        """Whether each picture but the first is made of what was before it."""
        for number in range(1, len(steps)):
            (now, _), (last, _) = steps[number], steps[number - 1]
            before = [
                each for picture, outputs in steps[max(0, number - _BEFORE) : number] for each in (picture, *outputs)
            ]
            if now.shape != last.shape or len(now) < _PER_WEIGHT * len(before):
                return False
            basis = torch.stack(before, 1)
            if not (basis.isfinite().all() and now.isfinite().all()):
                return False
            left = (now - basis @ torch.linalg.lstsq(basis, now[:, None], driver="gelsd").solution[:, 0]).norm()
            moved = (now - last).norm()
            if not (moved > 0 and left <= min(self._rounding * now.norm(), _SHARE_OF_MOVE * moved)):
                return False
        return True


class _Step:
    """The calls of one step: (2, samples, elements) each, the pictures and the outputs."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls: list[LateCopy] = []

    def values(self) -> tuple[Tensor, list[Tensor]]:
        """The first picture, and all that the model made of it, (elements,) each."""
        found = [call.values().double() for call in self.calls]
        first = found[0][0, 0]
        outputs = [
            value
            for pictures, values in found
            for given, value in zip(pictures, values, strict=True)
            if torch.equal(given, first)
        ]
        return first, outputs


def _beside_the_first(samples: int) -> list[int]:
    """The first sample, and those where guidance may repeat it: beside it, or after all others."""
    return sorted({0, 1 % samples, samples // 2, samples // 3, 2 * samples // 3})


def _of_picture(picture: Any, outputs: Sequence[Any]) -> Tensor | None:
    """The output that has a value for each of the picture's, or the first half of one with two; None without one."""
    if not isinstance(picture, Tensor) or not picture.is_floating_point() or picture.ndim < 2 or not picture.numel():
        return None
    found = next((value for value in outputs if isinstance(value, Tensor) and value.is_floating_point()), None)
    if found is None or found.device != picture.device:
        return None
    if found.ndim == picture.ndim and found.shape[1] == 2 * picture.shape[1]:
        found = found.narrow(1, 0, picture.shape[1])  # beside it what is predicted of the variance
    return found if found.shape == picture.shape else None
