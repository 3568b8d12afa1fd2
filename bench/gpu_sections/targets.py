"""What a step should cost, beside what it did cost: DSMoE-L-E16 in bfloat16, 32 samples of 256 tokens, N = 4."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.gpu_sections.common import Row
from bench.gpu_sections.kernels import TORCH_WHOLE
from bench.gpu_sections.speed import BASE, FORECAST, NONE, SIXTEENTH

MODEL, BATCH = "DSMoE-L-E16", 32
MANY = 8192
"""Rows of a grouped product from which the targets hold."""


@dataclass(frozen=True)
class Target:
    """`figure` is nan where the rows do not have it. It is met at `limit` or better."""

    what: str
    limit: float
    figure: float
    at_most: bool = True

    @property
    def verdict(self) -> str:
        if math.isnan(self.figure):
            return "not measured"
        return "met" if (self.figure <= self.limit if self.at_most else self.figure >= self.limit) else "MISSED"


def targets(rows: Sequence[Row], model: str = MODEL, batch: int = BATCH) -> list[Target]:
    """All targets, of the last rows that were measured."""
    found = {(row.what, row.batch, row.step, row.unit): row.value for row in rows}

    def of(way: str, step: str, unit: str = "ms") -> float:
        return found.get((f"{model}, {way}", batch, step, unit), math.nan)

    none = of(NONE, "mean")
    ours = [of(way, "ready", "s") for way in (NONE, FORECAST, SIXTEENTH)]
    return [
        Target("none, ms a step", 12.0, none),
        Target("full step of moeca-forecast / none", 1.05, of(FORECAST, "full") / none),
        Target("cache step with nothing recomputed / none", 0.08, of(FORECAST, "cache") / none),
        Target("cache step of moeca 1/16 / none", 0.15, of(SIXTEENTH, "cache") / none),
        Target("generation of moeca-forecast, times as fast as none", 3.3, none / of(FORECAST, "mean"), False),
        Target("generation of moeca 1/16, times as fast as none", 2.8, none / of(SIXTEENTH, "mean"), False),
        Target("host time of a cache step, ms", 0.2, of(FORECAST, "host")),
        Target("ready, s over plain torch.compile", 0.0, _worst(ours) - of(BASE, "ready", "s")),
        *_kernels(rows),
    ]


def _kernels(rows: Sequence[Row]) -> Iterator[Target]:
    shares = {row.what: float(row.ratio) for row in rows if row.section == "kernels" and row.ratio != ""}
    products = _least(shares, lambda what: what.startswith("moeca: ") and _rows_of(what) >= MANY)
    yield Target("grouped product, share of a dense one's rate", 0.8, products, False)
    against = [shares[what] / shares[other] for what in shares if (other := _of_torch(what)) in shares]
    yield Target("grouped product / torch's, sorted and gathered", 1.0, min(against, default=math.nan), False)
    for name in ("combine", "attend"):
        share = _least(shares, lambda what, name=name: what.startswith(name))
        yield Target(f"{name}, share of a copy's bandwidth", 0.8, share, False)


def _least(shares: dict[str, float], wanted: Callable[[str], bool]) -> float:
    return min((share for what, share in shares.items() if wanted(what)), default=math.nan)


def _rows_of(what: str) -> int:
    return int(what.split(": ")[1].split(" ")[0])


def _of_torch(what: str) -> str | None:
    """The row of torch's grouped product that has the sizes of one of ours."""
    name, _, sizes = what.partition(": ")
    return f"{TORCH_WHOLE}: {sizes}" if name == "moeca" and _rows_of(what) >= MANY else None


def _worst(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)
