"""Whether the input of a call goes on from that of the step before: the check by content.

A sampler changes its picture by a little from step to step, and another picture is far from it, whatever the calls'
order, threads and times say. Successive inputs of a sampler have a correlation above 0.85, with four steps a picture
too. Where it adds fresh noise they have less, at the first of ten DDPM steps 0.4. But then they are mostly noise,
which has a correlation near 0 with any other picture. What they show beside it may be in another picture too. How
much that is, neighboring elements tell, which have no correlation in noise.

On an accelerator the host would have to wait for the answer. It is copied from the device meanwhile, and known a step
later: then the caches are given up, and a warning says which call read another picture's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from functools import cache

import torch
from torch import Tensor

from moeca_compile.runtime.late import LateCopy, answers_at_once, recording

_LEAST = 0.7
"""The least correlation of two successive inputs, sample by sample, unless less shows that they are related."""
_SPREAD = 2.5
"""Of n elements it varies by 1 / sqrt(n) where a sampler adds fresh noise: so many times that may be missing."""
_CHANCE = 5.0
"""That of independent noise varies by 1 / sqrt(n), and is hardly ever so many times as much."""
_COMMON = 1.25
"""What a picture shows has this much more in common with another one, at most, than with itself one element aside."""
_COMPARED = 1024
"""So many elements of a sample are compared. The correlation of independent noise is then 0.03."""
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


Moves = Sequence[float]
"""How far each sample has moved, as a part of its size."""


class Trajectory:
    """The last input of a stream, and how far its samples have moved at most in one step."""

    __slots__ = ("elements", "fastest", "last", "pending")

    def __init__(self) -> None:
        self.last: Tensor | None = None
        """(samples, 3, compared elements) float32: the elements, and two neighbors of each."""
        self.elements = 0
        """How many elements a sample has."""
        self.fastest: Moves = ()
        self.pending: LateCopy | None = None
        """On an accelerator: how the last input relates to the one before."""

    def look(self, given: Tensor | None) -> tuple[Answer, Moves]:
        """How `given` relates to the last input, and how far its samples have moved.

        Of inputs with more samples than before, as where passes are joined, the first ones are compared.
        """
        if given is None or not answers_at_once(given.device) or not self._comparable(given):
            return Answer.UNKNOWN, ()
        now, before = self._pair(given)
        unmoved = torch.equal(now, before[:, 0])
        return (Answer.UNMOVED, ()) if unmoved else self._judged(_products(now, before))

    def note(self, given: Tensor | None, moved: Moves) -> None:
        """Take `given` as the last input, whose samples moved that far."""
        if given is None:
            return
        self.pending = None
        if not answers_at_once(given.device):
            if recording(given.device):  # what is recorded is not there before it is replayed
                self.last = None
                return
            if self._comparable(given):
                self.pending = LateCopy(_products(*self._pair(given)))
        self.last, self.elements = _with_neighbors(given), given.numel() // given.shape[0]
        if moved:
            faster = len(self.fastest) == len(moved)
            self.fastest = [max(pair) for pair in zip(self.fastest, moved, strict=True)] if faster else moved

    def strayed(self) -> bool:
        """Whether the last input, which could not be waited for, turns out to be another picture."""
        return self.pending is not None and self.pending.known and self._judged(self.pending.copy)[0] is Answer.OTHER

    def _comparable(self, given: Tensor) -> bool:
        """Whether there was an input whose samples have the same size, on the same device."""
        if self.last is None or given.device != self.last.device or given.ndim < 2:
            return False
        return given.numel() == given.shape[0] * self.elements > 0

    def _pair(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """An input (samples, compared elements) and the last one, with as many samples."""
        now, before = compared_elements(given), self.last
        assert before is not None
        samples = min(now.shape[0], before.shape[0])
        return (now, before) if now.shape[0] == before.shape[0] else (now[:samples], before[:samples])

    def _judged(self, products: Tensor) -> tuple[Answer, Moves]:
        assert self.last is not None
        chance = self.last.shape[-1] ** -0.5
        goes_on, moves = True, []
        limits = self.fastest if len(self.fastest) == products.shape[0] else [math.inf] * products.shape[0]
        for ((now, both, *_), (_, before, beside, below), *_), fastest in zip(products.tolist(), limits, strict=True):
            moved = math.sqrt(max(0.0, now - 2 * both + before) / before) if before > 0 else math.inf if now else 0.0
            common = max(beside, -beside, below, -below) / before if before > 0 else math.inf
            least = min(_LEAST - _SPREAD * chance, _CHANCE * chance + _COMMON * common)
            alike = both >= least * math.sqrt(now * before)  # and so no NaN
            goes_on &= alike and moved < max(_WITHIN, _FASTER * fastest)
            moves.append(moved)
        return (Answer.GOES_ON if goes_on else Answer.OTHER), moves


def compared_elements(given: Tensor) -> Tensor:
    """(samples, at most _COMPARED elements) float32, evenly spread over each sample."""
    rows = given.detach().reshape(given.shape[0], -1)
    return rows[:, :: -(-rows.shape[1] // _COMPARED)].float() if rows.shape[1] else rows.float()


def _with_neighbors(given: Tensor) -> Tensor:
    """(samples, 3, compared elements) float32: elements, and two neighbors of each.

    These are the next one, and the one in the next row or token: wherever channels are, one of them is beside it.
    """
    rows = given.detach().reshape(given.shape[0], -1)
    places = _places(rows.shape[1], given.shape[-1], given.device)
    return rows.index_select(1, places).view(rows.shape[0], 3, -1).float()


@cache
def _places(elements: int, width: int, device: torch.device) -> Tensor:
    """Where these are in a sample of so many elements, in rows of `width`: (3 compared elements) int64."""
    compared = torch.arange(0, elements, max(1, -(-elements // _COMPARED)), device=device)
    beside = width if 2 * width <= elements else 1
    return torch.cat([compared, compared + 1, compared + beside]).clamp(max=max(0, elements - 1))


def _products(now: Tensor, before: Tensor) -> Tensor:
    """(samples, 4, 4) products with one another: of a sample's input, the one before, and the neighbors in that."""
    rows = torch.cat((now[:, None], before), 1)
    return rows @ rows.mT
