"""Whether the input of a call goes on from that of the step before: the check by content.

A sampler changes its picture by a little from step to step, and another picture is far from it, whatever the calls'
order, threads and times say. Independent noise has a correlation near 0. Successive inputs of a sampler have one
above 0.85, with four steps a picture too, and less only where a sampler adds much fresh noise at each of few steps:
such steps are full.

On an accelerator nothing is compared, since the host would have to wait for the device.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

_CPU = torch.device("cpu")
_LEAST = 0.7
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
        """How `given` relates to the last input, and how far its samples have moved.

        Of inputs with more samples than before, as where passes are joined, the first ones are compared.
        """
        if given is None or self.last is None or not _comparable(given, self.last):
            return Answer.UNKNOWN, None
        now, before = _rows(given), self.last
        if now.shape[0] != before.shape[0]:
            samples = min(now.shape[0], before.shape[0])
            now, before = now[:samples], before[:samples]
        if torch.equal(now, before):
            return Answer.UNMOVED, None
        size = before.square().sum(1)
        moved = ((now - before).square().sum(1) / size).sqrt()
        near = (now * before).sum(1) >= _LEAST * (now.square().sum(1) * size).sqrt()
        if self.fastest is not None and self.fastest.shape == moved.shape:
            near &= moved <= (_FASTER * self.fastest).clamp_min(_WITHIN)
        return (Answer.GOES_ON if bool(near.all()) else Answer.OTHER), moved

    def note(self, given: Tensor | None, moved: Tensor | None) -> None:
        """Take `given` as the last input, which moved that far."""
        if given is None:
            return
        self.last = _rows(given).clone()
        if moved is not None:
            known = self.fastest is not None and self.fastest.shape == moved.shape
            self.fastest = torch.maximum(self.fastest, moved) if known else moved  # type: ignore[arg-type]


def _comparable(given: Tensor, last: Tensor) -> bool:
    """Whether samples of the two have the same size, on the CPU. `last` is (samples, elements)."""
    samples = given.shape[0] if given.ndim > 1 else 0
    return samples > 0 and given.numel() == samples * last.shape[1] and given.device == last.device == _CPU


def _rows(given: Tensor) -> Tensor:
    return given.detach().reshape(given.shape[0], -1).float()
