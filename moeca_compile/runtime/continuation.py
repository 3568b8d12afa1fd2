"""Whether the input of a call goes on from that of the step before: the check by content.

A sampler changes its picture by a little from step to step, and another picture is far from it, whatever the calls'
order, threads and times say. Independent noise has a correlation near 0. The steps of a sampler have one above 0.85,
with four steps a picture too, and fall below a half only where a sampler adds fresh noise at each of few steps.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

_LEAST = 0.5
"""The least correlation of two successive inputs, sample by sample."""
_WITHIN = 0.25
"""A sample that moves by less than this part of its size goes on in any case."""
_FASTER = 5.0
"""It may move by so many times its largest move so far."""


class Answer(Enum):
    """How an input relates to the one before."""

    GOES_ON = "it goes on from the one before"
    UNMOVED = "it is the one before"
    OTHER = "some sample is another picture"
    UNKNOWN = "nothing to compare with"


class Trajectory:
    """The last input of a stream, and how far its samples have moved at most in one step."""

    __slots__ = ("fastest", "last")

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.fastest: Tensor | None = None

    def look(self, given: Tensor | None) -> tuple[Answer, Tensor | None]:
        """How `given` relates to the last input, and how far its samples have moved; compares what fits."""
        if given is None or self.last is None or not comparable(given, self.last):
            return Answer.UNKNOWN, None
        with torch.no_grad():
            samples = min(len(given), len(self.last))
            now, before = _rows(given[:samples]), self.last[:samples]
            if torch.equal(now, before):
                return Answer.UNMOVED, None
            sizes = (now.square().sum(1) * before.square().sum(1)).sqrt()
            moved = (now - before).square().sum(1).div(before.square().sum(1)).sqrt()
            near = (now * before).sum(1) >= _LEAST * sizes
            if self.fastest is not None and len(self.fastest) == samples:
                near &= moved <= (_FASTER * self.fastest).clamp_min(_WITHIN)
            return (Answer.GOES_ON if bool(near.all()) else Answer.OTHER), moved

    def note(self, given: Tensor | None, moved: Tensor | None) -> None:
        """Take `given` as the last input."""
        if given is None:
            return
        with torch.no_grad(), torch.inference_mode(False):
            self.last = _rows(given).clone()
        if moved is not None:
            known = self.fastest is not None and self.fastest.shape == moved.shape
            self.fastest = torch.maximum(self.fastest, moved) if known else moved  # type: ignore[arg-type]


def comparable(given: Tensor, last: Tensor) -> bool:
    """Whether samples of the two have the same size. `last` is (samples, elements)."""
    return given.ndim > 1 and len(given) > 0 and given[0].numel() == last.shape[1] and given.device == last.device


def _rows(given: Tensor) -> Tensor:
    return given.detach().reshape(len(given), -1).float()
