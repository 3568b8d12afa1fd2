"""A comparison of ways to sample as text for people, as plain values, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeca_compile.command.bench import Comparison, Row
from moeca_compile.command.likeness import Likeness, pictures, value_range
from moeca_compile.command.table import framed
from moeca_compile.text import binary_bytes, count, plural, remarks_once, seconds

SHOWN = 8
"""Pictures of each way that are drawn."""
CAPTION = (
    "Speed-ups are medians over {0} of whole generations in turns. The first generation is apart, with all "
    "compilation that earlier processes have not left on disk. PSNR and SSIM are to eager from the same seeds."
)
_NO_FIGURE = "-"


def text_of(found: Comparison) -> str:
    """The table, and below it how to read it and what went wrong."""
    size = f"{count(found.parameters)} parameters, {found.device}, {found.dtype}"
    columns = _columns(found)
    rows = [[row.name, *(cells[row.name] for cells in columns.values())] for row in found.rows]
    return "\n".join(
        [
            f"{found.model}, {size}, results {found.shape}",
            framed(["", *columns], rows),
            CAPTION.format(plural(len(found.seeds), "seed")),
            *remarks_once((row.name, row.remarks) for row in found.rows),
        ]
    )


def _columns(found: Comparison) -> dict[str, dict[str, str]]:
    """Cells by heading and row, without columns that nobody has a figure for."""
    figures = {
        "a generation": lambda row: _text(row.seconds, seconds),
        "over torch.compile": lambda row: _text(row.over_compile, _times),
        "over eager": lambda row: _text(row.over_eager, _times),
        "first": lambda row: seconds(row.first_seconds + row.later_compile_seconds),
        "PSNR dB": lambda row: _psnr(row.likeness),
        "SSIM": lambda row: _text(row.likeness and row.likeness.ssim, "{:.4f}".format),
        "LPIPS": lambda row: _text(row.likeness and row.likeness.lpips, "{:.4f}".format),
        "calls": lambda row: ", ".join(f"{count(n)} {kind}".strip() for kind, n in row.calls.items()) or _NO_FIGURE,
        "caches": lambda row: _text(row.cache_bytes or None, binary_bytes),
        "peak": lambda row: _text(row.peak_bytes, binary_bytes),
    }
    cells = {heading: {row.name: figure(row) for row in found.rows} for heading, figure in figures.items()}
    return {heading: column for heading, column in cells.items() if set(column.values()) != {_NO_FIGURE}}


def _text(figure: Any, form: Any) -> str:
    return _NO_FIGURE if figure is None else form(figure)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _psnr(near: Likeness | None) -> str:
    return "equal" if near and near.equal else _text(near and near.psnr, "{:.1f}".format)


def save_values(found: Comparison, path: Path) -> None:
    """Write all figures as JSON. Raises OSError where that cannot be done."""
    values = {
        "model": found.model,
        "parameters": found.parameters,
        "device": found.device,
        "dtype": found.dtype,
        "shape": list(found.shape),
        "seeds": list(found.seeds),
        "machine": dict(found.machine),
        "rows": [_values(row) for row in found.rows],
    }
    path.write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")


def _values(row: Row) -> Mapping[str, Any]:
    values = asdict(row)
    near = values.pop("likeness") or {}
    near.pop("remarks", None)
    return {**values, **{name: near.get(name) for name in ("equal", "psnr", "ssim", "lpips")}}


def save_picture(found: Comparison, path: Path) -> None:
    """Draw the first pictures of each way, a row for each, on the scale of those of eager. Its suffix is the format.

    Raises OSError where it cannot be written.
    """
    from matplotlib.figure import Figure

    shown = {name: _first_pictures(results) for name, results in found.results.items()}
    low, high = value_range([next(iter(shown.values()))])
    columns = min(SHOWN, len(next(iter(shown.values()))))
    size = (1.3 * columns + 1.8, 1.4 * len(shown))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(shown), columns, squeeze=False)
    titles = {row.name: _title(row) for row in found.rows}
    for axes_of_way, (name, drawn) in zip(grid, shown.items(), strict=True):
        axes_of_way[0].set_ylabel(titles[name], rotation=0, ha="right", va="center", fontsize=9)
        for axes, picture in zip(axes_of_way, drawn, strict=True):
            axes.set(xticks=[], yticks=[], frame_on=False)
            scaled = ((picture.float() - low) / ((high - low) or 1)).clamp(0, 1)
            axes.imshow(scaled.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
    figure.savefig(path, dpi=150)


def _first_pictures(results: Any) -> Tensor:
    found = torch.cat([shown for each in results if (shown := pictures(each)) is not None])
    return found[:SHOWN]


def _title(row: Row) -> str:
    speed, psnr = _text(row.over_compile, _times), _psnr(row.likeness)
    about = [part for part in (speed, psnr if psnr in ("equal", _NO_FIGURE) else f"{psnr} dB") if part != _NO_FIGURE]
    return "\n".join([*row.name.split(), ", ".join(about)])
