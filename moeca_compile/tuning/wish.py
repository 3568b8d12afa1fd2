"""What the user wishes for: a speed-up, a time, or a quality. The other one is made as good as it gets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from moeca_compile.tuning.rows import Row

ONE_OF = "give exactly one of speedup, psnr and seconds to moeca_compile.tune: the other side is then optimized"


@dataclass(frozen=True)
class Wish:
    """One wish.

    Attributes:
        kind: "speedup" (at least so many times faster than uncached), "seconds" (a generation takes no longer) or
            "psnr" (at least so many dB to the uncached outputs).
        value: what is wished for.
    """

    kind: str
    value: float

    @property
    def is_quality(self) -> bool:
        return self.kind == "psnr"

    def meets(self, row: Row) -> bool:
        if self.kind == "speedup":
            return row.speedup >= self.value
        return row.seconds <= self.value if self.kind == "seconds" else row.psnr >= self.value

    def merit(self, row: Row) -> float:
        """What to compare rows by that meet the wish; the higher the better."""
        return row.speedup if self.is_quality else row.quality

    def shortfall(self, row: Row) -> float:
        """How far a row is from the wish, to compare rows by where none meets it."""
        return -row.psnr if self.is_quality else -row.speedup

    def seconds(self, uncached: float) -> float:
        """The seconds that a generation may take, where the wish is no quality."""
        return self.value if self.kind == "seconds" else uncached / self.value

    def holds_up(self, row: Row, default: Row) -> bool:
        """Whether a row is no worse than the default candidate on seeds that were held back; or meets the wish on
        them, where that is one of quality."""
        if row.held_back_quality >= default.held_back_quality:
            return True
        return self.is_quality and row.held_back_psnr >= self.value


def wish_of(speedup: float | None, psnr: float | None, seconds: float | None) -> Wish:
    """The one wish among these. Raises ValueError where there is none, or more, or its value makes no sense."""
    given = {"speedup": speedup, "psnr": psnr, "seconds": seconds}
    found = [(kind, value) for kind, value in given.items() if value is not None]
    if len(found) != 1:
        raise ValueError(f"{ONE_OF}; got {', '.join(kind for kind, _ in found) or 'none'}")
    kind, value = found[0]
    number: Any = value
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number) or number <= 0:
        raise ValueError(f"{kind}={value!r}: a finite number above 0")
    if kind == "speedup" and number <= 1:
        raise ValueError(f"speedup={value!r}: a number above 1, which is the uncached model")
    return Wish(kind, float(number))
