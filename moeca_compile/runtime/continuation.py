"""Whether the input of a call goes on from that of the step before: the check by content.

A sampler changes its picture by a little from step to step, and another picture is far from it, whatever the calls'
order, threads and times say. Independent noise has a correlation near 0. Successive inputs of a sampler have one
above 0.85, with four steps a picture too, and less only where a sampler adds much fresh noise at each of few steps:
such steps are full.

On an accelerator the host would have to wait for the answer. It is copied from the device meanwhile, and known a step
later: then the caches are given up, and a warning says which call read another picture's.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

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

    __slots__ = ("fastest", "last", "pending")

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.fastest: Tensor | None = None
        self.pending: _Late | None = None
        """On an accelerator: whether the last input went on from the one before."""

    def look(self, given: Tensor | None) -> tuple[Answer, Tensor | None]:
        """How `given` relates to the last input, and how far its samples have moved.

        Of inputs with more samples than before, as where passes are joined, the first ones are compared.
        """
        if not self._comparable(given) or not answers_at_once(given.device):  # type: ignore[union-attr]
            return Answer.UNKNOWN, None
        now, before = self._pair(given)  # type: ignore[arg-type]
        if torch.equal(now, before):
            return Answer.UNMOVED, None
        near, moved = self._near(now, before)
        return (Answer.GOES_ON if bool(near) else Answer.OTHER), moved

    def note(self, given: Tensor | None, moved: Tensor | None) -> None:
        """Take `given` as the last input, which moved that far."""
        if given is None:
            return
        self.pending = None
        if not answers_at_once(given.device) and self._comparable(given) and not _recording(given.device):
            near, moved = self._near(*self._pair(given))
            self.pending = _Late(near)
        self.last = _rows(given).clone()
        if moved is not None:
            known = self.fastest is not None and self.fastest.shape == moved.shape
            self.fastest = torch.maximum(self.fastest, moved) if known else moved  # type: ignore[arg-type]

    def strayed(self) -> bool:
        """Whether the last input, which could not be waited for, turns out to be another picture."""
        return self.pending is not None and self.pending.known and not self.pending.value

    def _comparable(self, given: Tensor | None) -> bool:
        """Whether there was an input whose samples have the same size, on the same device."""
        if given is None or self.last is None:
            return False
        samples = given.shape[0] if given.ndim > 1 else 0
        same_size = samples > 0 and given.numel() == samples * self.last.shape[1]
        return same_size and given.device == self.last.device

    def _pair(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """(samples, elements) float32: an input and the last one."""
        now, before = _rows(given), self.last
        assert before is not None
        samples = min(now.shape[0], before.shape[0])
        return (now, before) if now.shape == before.shape else (now[:samples], before[:samples])

    def _near(self, now: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Whether all samples go on, () bool, and how far each has moved, of its size."""
        size = before.square().sum(1)
        moved = ((now - before).square().sum(1) / size).sqrt()
        near = (now * before).sum(1) >= _LEAST * (now.square().sum(1) * size).sqrt()
        if self.fastest is not None and self.fastest.shape == moved.shape:
            near &= moved <= (_FASTER * self.fastest).clamp_min(_WITHIN)
        return near.all(), moved


class _Late:
    """A truth value that is copied from a device while the host goes on."""

    def __init__(self, value: Tensor) -> None:
        self.copy, self.event = torch.empty((), dtype=torch.bool, pin_memory=value.is_cuda), None
        self.copy.copy_(value, non_blocking=True)
        if value.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(value.device))

    @property
    def known(self) -> bool:
        return self.event is None or bool(self.event.query())

    @property
    def value(self) -> bool:
        return bool(self.copy)


def answers_at_once(device: torch.device) -> bool:
    """Whether the host need not wait for a device's values."""
    return device.type == "cpu"


def _recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _rows(given: Tensor) -> Tensor:
    return given.detach().reshape(given.shape[0], -1).float()
