"""What was measured of one candidate, and the file that keeps rows while a tune goes on."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moeca_compile.tuning.quality import BEST, REPEATABLE, psnr_of_each

FORM, FORMAT = "moeca_tuning", 1
OTHER = "{0} has rows of another tune: {1} was {2!r} there and is {3!r} now. Give another path, or remove the file"
OTHER_LOOP = (
    "{0} has rows of another tune: the uncached outputs were others there ({1}). Give another path, or remove it"
)
DAMAGED = "{0} is damaged or has no rows of a tune ({1}). Give another path, or remove the file"


@dataclass(frozen=True)
class Row:
    """One candidate, measured.

    Attributes:
        name: recipe, schedule, number of full steps and what else differs, in words.
        options: of `torch.compile(model, backend="moeca", options=...)`, in plain values.
        full_steps: how many of the steps of a generation are full; planned to be, where the option `max_error` lets
            each picture have its own number.
        seconds: median of a generation's wall-clock time.
        uncached_seconds: that of the uncached model (recipe "none", compiled), in turns with it.
        speedup: median of the ratios of these turns.
        times, uncached_times: the single generations, in seconds.
        compile_seconds: what the first generation took beyond the median, most of it compilation.
        flops_speedup: how many times fewer FLOPs; None where that is not known.
        cache_bytes: of the caches of one stream.
        psnr, psnr_worst: mean and least over the first dimension of the outputs, in dB to the uncached ones.
        ssim: mean structural similarity; None where it does not apply or scikit-image is not installed.
        metric: mean of the user's metric; None without one.
        held_back_psnr, held_back_metric: the same on the seeds that were held back.
        environment: device, threads, dtype and versions of this measurement.
        note: why the row cannot be chosen, "" where it can.
        warnings: of the candidate's report after all its generations.
        uncached_psnr: mean PSNR of the uncached model, compiled, in the timed generations: what rounding alone does.
    """

    name: str
    options: Mapping[str, Any]
    full_steps: int
    seconds: float
    uncached_seconds: float
    speedup: float
    times: tuple[float, ...]
    uncached_times: tuple[float, ...]
    compile_seconds: float
    flops_speedup: float | None
    cache_bytes: int
    psnr: float
    psnr_worst: float
    ssim: float | None
    metric: float | None
    held_back_psnr: float
    held_back_metric: float | None
    environment: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    warnings: tuple[str, ...] = ()
    uncached_psnr: float | None = None

    @property
    def quality(self) -> float:
        """The user's metric, or else the PSNR."""
        return self.psnr if self.metric is None else self.metric

    @property
    def held_back_quality(self) -> float:
        return self.held_back_psnr if self.held_back_metric is None else self.held_back_metric

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Raises TypeError or KeyError for values that are none of a row."""
        lists = {name: tuple(values[name]) for name in ("times", "uncached_times")}
        lists["warnings"] = tuple(values.get("warnings", ()))
        return cls(**{**values, **lists})


class Store:
    """The rows of one tune, by name.

    Args:
        path: where each row is written as soon as it is there; None keeps them in memory alone.
        subject: what the rows depend on, in plain values: a file with another one is refused.
        outputs: [N] values of the uncached outputs; a file is refused where they are further apart than two runs of
            one seed may be.

    Raises ValueError where the file is damaged or of another tune.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, subject: Mapping[str, Any], outputs: Sequence[float] = ()
    ) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.subject, self.outputs = json.loads(json.dumps(subject)), [*outputs]
        self.rows = self._read() if self.path is not None and self.path.exists() else {}
        self.asked: dict[str, Row] = {}
        """The rows that this tune has asked for: a file may have those of other recipes and wishes."""

    def known(self, name: str, options: Mapping[str, Any]) -> Row | None:
        """The row of that name, if it was measured with these options."""
        row = self.rows.get(name)
        if row is None or row.options != json.loads(json.dumps(options)):
            return None
        self.asked[name] = row
        return row

    def alike(self, options: Mapping[str, Any]) -> Row | None:
        """A row of any name that was measured with these options: one full step is one by every schedule."""
        plain = json.loads(json.dumps(options))
        return next((row for row in self.rows.values() if json.loads(json.dumps(row.options)) == plain), None)

    def add(self, row: Row) -> None:
        self.rows[row.name] = self.asked[row.name] = row
        if self.path is None:
            return
        rows = [each.to_dict() for each in self.rows.values()]
        write_json(self.path, {FORM: FORMAT, "subject": self.subject, "outputs": self.outputs, "rows": rows})

    def _read(self) -> dict[str, Row]:
        assert self.path is not None
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            if values[FORM] != FORMAT:
                raise ValueError(f"format {values[FORM]!r}")
            subject, rows = dict(values["subject"]), [Row.from_dict(row) for row in values["rows"]]
            outputs = [float(value) for value in values["outputs"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(DAMAGED.format(self.path, f"{type(error).__name__}: {error}")) from None
        for name, now in self.subject.items():
            if subject.get(name) != now:
                raise ValueError(OTHER.format(self.path, name, subject.get(name), now))
        if len(outputs) != len(self.outputs):
            raise ValueError(OTHER_LOOP.format(self.path, f"{len(outputs)} values and {len(self.outputs)}"))
        apart = _decibels(outputs, self.outputs)
        if apart < REPEATABLE:
            raise ValueError(OTHER_LOOP.format(self.path, f"{apart:.0f} dB apart"))
        return {row.name: row for row in rows}


def _decibels(found: Sequence[float], wanted: Sequence[float]) -> float:
    span = max(wanted, default=0.0) - min(wanted, default=0.0)
    return psnr_of_each(torch.tensor([found]), torch.tensor([wanted]), span)[0] if span else BEST


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file whole, or leave the one that is there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
