"""Whether the sampler of a request draws noise between its steps: seen from its first pictures.

A sampler without noise makes each picture by a sum of the pictures and the model's outputs before it, with weights
that depend on the time alone: Euler, Heun, DPM-Solver, DDIM and linear multistep methods, guided or not. So the next
picture lies in the span of what was before, but for rounding. Fresh noise does not, as hardly any of it can be
explained by so few numbers. Nothing is said of a sampler that does anything else, such as clipping what it predicts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeca_compile.runtime.continuation import compared_elements
from moeca_compile.runtime.late import LateCopy, recording

_log = logging.getLogger(__name__)

_FIRST = 3
"""So many steps are looked at first: each picture but the first is made of what was before it."""
_EVERY = 12
"""And some more every so many steps: noise may begin late, between two times (SA-Solver) or at one (churn)."""
_BEFORE = 4
"""Of the later ones so many are only what pictures are made of: a multistep method looks back so far."""
_LATER = _BEFORE + 2
_MOST_CALLS = 6
"""So many calls of a step are kept. Where the timestep stays, as in a warm-up, there is no end of them."""
_SHARE_OF_MOVE = 0.25
"""What is not explained may be this part of the picture's move, at most. With noise it is most of that."""
_ROUNDING = 1e-4
"""And this part of the picture, or twice the rounding of its dtype: a sampler may compute in another dtype."""
_PER_WEIGHT = 2
"""So many elements must be explained by each weight."""


class SeenSampler:
    """The pictures of some steps of a request, what the model made of them, and what that says."""

    __slots__ = ("_answer", "_device", "_done", "_rounding", "_steps")

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._answer: bool | None = None
        self._done = False
        """Whether noise, or what cannot be looked at, was seen: then nothing is said any more."""
        self._rounding, self._device = _ROUNDING, torch.device("cpu")

    def note(self, number: int, picture: Any, outputs: Sequence[Any]) -> None:
        """See a call.

        Args:
            number: of its step. Calls at one step are the parts of a guided output, or at one time by chance.
            picture: (B, ...), which the sampler changes; outputs: those of the model.
        """
        if self._done or number % _EVERY >= (_FIRST if number < _EVERY else _LATER):
            return
        try:
            self._note(number, picture, outputs)
        except Exception:  # a tensor of some kind whose values cannot be read
            self._give_up()

    def _note(self, number: int, picture: Any, outputs: Sequence[Any]) -> None:
        last = self._steps[-1] if self._steps else None
        again = last if last is not None and last.number == number else None
        begins, follows = number % _EVERY == 0, last is not None and last.number == number - 1
        if not (again or begins or follows) or (again and len(again.calls) >= _MOST_CALLS):
            return
        output = _of_picture(picture, outputs)
        if output is None or recording(picture.device):
            return
        chosen = _beside_the_first(len(picture))
        values = LateCopy(torch.stack((compared_elements(picture)[chosen], compared_elements(output)[chosen])))
        self._device, self._rounding = picture.device, max(_ROUNDING, 2 * torch.finfo(picture.dtype).eps)
        if again:
            again.calls.append(values)
        else:
            self._steps = [*([] if begins else self._steps), _Step(number, values)]

    def deterministic(self) -> bool | None:
        """True where steps in a row were made without noise, and none with it since; None where that is not seen.

        The first one who asks once there are enough waits for the device, if it has not come that far: what is
        corrected must not depend on how fast it is.
        """
        first = not self._steps or self._steps[0].number == 0
        if self._done or len(self._steps) < (_FIRST if first else _LATER) or recording(self._device):
            return self._answer
        try:
            found = self._without_noise(1 if first else _BEFORE)
        except Exception:
            found = False
        self._steps = []
        if found is False:
            self._give_up()
        else:
            self._answer = found or self._answer
        return self._answer

    def _give_up(self) -> None:
        _log.debug("the sampler draws noise, or cannot be told", exc_info=True)
        self._done, self._answer, self._steps = True, None, []

    def _without_noise(self, since: int) -> bool | None:
        """Whether each picture from step `since` on is made of what was before; None where rounding may hide noise.

        A step may have several: the second half of a step of Heun's is called at the time of the next one.
        """
        pictures, before, sure = list[Tensor](), list[Tensor](), True
        for at, step in enumerate(self._steps):
            for given, outputs in (call.values().double() for call in step.calls):
                picture = given[0]
                if not any(torch.equal(picture, known) for known in pictures):
                    made = self._is_made_of(before, picture, pictures[-1]) if at >= since else True
                    if made is False:
                        return False
                    sure &= made is True
                    pictures.append(picture)
                    before.append(picture)
                pairs = zip(given, outputs, strict=True)
                before += [output for of, output in pairs if any(torch.equal(of, known) for known in pictures)]
        return True if sure and len(pictures) >= len(self._steps) else None

    def _is_made_of(self, before: Sequence[Tensor], picture: Tensor, last: Tensor) -> bool | None:
        if picture.shape != last.shape or len(picture) < _PER_WEIGHT * len(before):
            return None
        basis = torch.stack(tuple(before), 1)
        if not (basis.isfinite().all() and picture.isfinite().all()):
            return False
        left = (picture - basis @ torch.linalg.lstsq(basis, picture[:, None], driver="gelsd").solution[:, 0]).norm()
        if left > self._rounding * picture.norm():
            return False
        return True if left <= _SHARE_OF_MOVE * (picture - last).norm() else None


class _Step:
    """The calls of one step: (2, samples, elements) each, the pictures and the outputs."""

    __slots__ = ("calls", "number")

    def __init__(self, number: int, first: LateCopy) -> None:
        self.number, self.calls = number, [first]


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
