"""The outcome of a tune: the rows of all candidates, the chosen options, and a file of both."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeca_compile import tuned_file
from moeca_compile.text import aligned, binary_bytes, remarks_once
from moeca_compile.tuned_file import FORM, FORMAT, Fingerprint
from moeca_compile.tuning.rows import Row, write_json
from moeca_compile.tuning.wish import Wish

NO_MATPLOTLIB = "plots need matplotlib: pip install matplotlib"


@dataclass(frozen=True)
class Tuned:
    """What `moeca_compile.tune` has found.

    Attributes:
        wish: what was wished for: {"speedup": 4.0}, {"psnr": 40.0} or {"seconds": 0.5}.
        met: whether the chosen row meets it by the very times and outputs that decided. As the best of many
            measurements they flatter a little; they are not taken again.
        chosen, default: names of the chosen row and of the default candidate's.
        rows: all that this tune asked for.
        steps, calls: steps of a generation, and its calls of the model.
        seeds, held_back: the seeds that decided, and those that checked the decision.
        schedules: calibrated full steps, by their number.
        model: the structure of the model that all this holds for.
        environment: device, threads, dtype and versions.
    """

    wish: Mapping[str, float]
    met: bool
    chosen: str
    default: str
    rows: tuple[Row, ...]
    steps: int
    calls: int
    seeds: tuple[int, ...]
    held_back: tuple[int, ...]
    schedules: Mapping[int, tuple[int, ...]]
    model: Fingerprint
    environment: Mapping[str, Any]

    @property
    def row(self) -> Row:
        """The chosen one."""
        return self.named(self.chosen)

    @property
    def options(self) -> Mapping[str, Any]:
        """The chosen options, for `torch.compile(model, backend="moeca", options=...)`."""
        return self.row.options

    @property
    def held_up(self) -> bool:
        """Whether the chosen row is no worse than the default candidate on the seeds that were held back. For a wish
        of quality, meeting the wish there is enough."""
        ((kind, value),) = self.wish.items()
        return Wish(kind, value).holds_up(self.row, self.named(self.default))

    @property
    def uncached_psnr(self) -> float | None:
        """dB of the uncached model, compiled, to the uncached outputs: what rounding alone does."""
        return self.row.uncached_psnr

    @property
    def frontier(self) -> tuple[Row, ...]:
        """The rows that no other one beats in both speed and quality, the fastest first."""
        usable = sorted((row for row in self.rows if not row.note), key=lambda row: (-row.speedup, -row.quality))
        found: list[Row] = []
        for row in usable:
            if not found or row.quality > found[-1].quality:
                found.append(row)
        return tuple(found)

    def named(self, name: str) -> Row:
        """The row of that name. Raises KeyError where there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a JSON file, which the options `tuned` and `schedule` take; `schedule` takes it for a file only
        where the path ends in ".json". Raises OSError where that fails."""
        values = {
            FORM: FORMAT,
            "wish": dict(self.wish),
            "met": self.met,
            "chosen": self.chosen,
            "default": self.default,
            "options": dict(self.options),
            "steps": self.steps,
            "calls": self.calls,
            "seeds": self.seeds,
            "held_back": self.held_back,
            "model": self.model._asdict(),
            "versions": {name: self.environment[name] for name in ("torch", "moeca_compile")},
            "environment": dict(self.environment),
            "schedules": {str(full): listed for full, listed in self.schedules.items()},
            "rows": [row.to_dict() for row in self.rows],
        }
        write_json(Path(path).expanduser(), json.loads(json.dumps(values)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tuned:
        """What `save` wrote. Raises ValueError for any other file, with what to do."""
        values = tuned_file.read(path)
        try:
            return cls(
                **{
                    name: values[name]
                    for name in ("wish", "met", "chosen", "default", "steps", "calls", "environment")
                },
                rows=tuple(map(Row.from_dict, values["rows"])),
                seeds=tuple(values["seeds"]),
                held_back=tuple(values["held_back"]),
                schedules={int(full): tuple(listed) for full, listed in values["schedules"].items()},
                model=Fingerprint(**values["model"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): tune again") from None

    def plot(self, ax: Any = None) -> Any:
        """Draw speed-up against quality of all rows on `ax`, or on a new figure; returns the axes.

        Raises ImportError without matplotlib.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError(NO_MATPLOTLIB) from error
        ax = pyplot.figure(layout="constrained").subplots() if ax is None else ax
        usable = [row for row in self.rows if not row.note]
        for label, rows, style in (
            ("measured", usable, {"marker": "o", "linestyle": "", "color": "0.6"}),
            ("frontier", self.frontier, {"marker": "o", "color": "C0"}),
            ("default", [self.named(self.default)], {"marker": "s", "linestyle": "", "color": "C1"}),
            ("chosen", [self.row], {"marker": "*", "linestyle": "", "color": "C3", "markersize": 14}),
        ):
            ax.plot([row.speedup for row in rows], [row.quality for row in rows], label=label, **style)
        ax.set_xlabel("speed-up over uncached")
        ax.set_ylabel("PSNR to uncached, dB" if self.row.metric is None else "metric")
        if "speedup" in self.wish:
            ax.axvline(self.wish["speedup"], color="0.8", zorder=0)
        if "psnr" in self.wish and self.row.metric is None:
            ax.axhline(self.wish["psnr"], color="0.8", zorder=0)
        ax.legend()
        return ax

    def __str__(self) -> str:
        ((kind, value),) = self.wish.items()
        state = "met" if self.met else "not met: the nearest was taken"
        environment = ", ".join(str(value) for value in self.environment.values() if value)
        where = f"{self.steps} steps, seeds {_listed(self.seeds)}, held back {_listed(self.held_back)}; {environment}"
        head = ("", "speed-up", "seconds", "FLOPs", "PSNR", "worst", "held back", "cache", "candidate")
        body = [self._cells(row) for row in sorted(self.rows, key=lambda row: -row.speedup)]
        if not self.held_up:
            state += "; on the held-back seeds the chosen one is worse than the default"
        floor = self.uncached_psnr
        rounding = [] if floor is None else [f"uncached, compiled: {floor:.1f} dB, by rounding alone"]
        remarks = remarks_once(((row.name, row.warnings) for row in self.rows), between="; ")  # names have commas
        table = aligned([head, *body])
        return "\n".join([f"{kind} {value:g}, {state}", where, *table, "* chosen, d default", *rounding, *remarks])

    def _cells(self, row: Row) -> tuple[str, ...]:
        mark = "*" * (row.name == self.chosen) + "d" * (row.name == self.default)
        flops = f"{row.flops_speedup:.2f}x" if row.flops_speedup is not None else "-"
        figures = (
            f"{row.psnr:.1f}",
            f"{row.psnr_worst:.1f}",
            f"{row.held_back_psnr:.1f}",
            binary_bytes(row.cache_bytes),
        )
        name = row.name + (f" ({row.note})" if row.note else "")
        return (mark, f"{row.speedup:.2f}x", f"{row.seconds:.3f}", flops, *figures, name)


def _listed(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))
