"""Figures of the page as SVG: bars over steps, heat maps, and maps of the picture's tokens.

Colors are classes, which the page's style sheet gives for light and dark. No value is told by color alone: each cell
has its value as a title, and each figure a legend with numbers. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup

from moeca_compile.text import seconds

LEVELS = 10
"""Shades of a scale."""
_CELL, _GAP, _LABEL, _ROW = 14, 1, 6.8, 14
_LONGEST = 34
_TOP, _AXIS = 8, 30


def level(value: float, low: float, high: float) -> int:
    """The shade of a value, from 0 to LEVELS - 1."""
    share = (value - low) / (high - low) if high > low else 0.0
    return min(LEVELS - 1, max(0, int(share * LEVELS)))


def round_above(value: float) -> float:
    """The next of 1, 2, 4, 5, 10, 20, ... that is no less: the end of an axis with a mark in its middle."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * step for step in (1, 2, 4, 5, 10, 20) if value <= unit * step)


def shortened(name: str, longest: int = _LONGEST) -> str:
    """A name with its middle left out where it is long: names of modules differ at both ends."""
    if len(name) <= longest:
        return name
    half = (longest - 1) // 2
    return f"{name[: longest - 1 - half]}…{name[len(name) - half :]}"


def heat_map(
    key: str,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    shown: Callable[[float], str],
    low: float = 0.0,
    high: float | None = None,
    axis: str = "step",
) -> Markup:
    """A cell for each value, in rows with labels. Where a value is None there is a gap.

    Args:
        key: distinguishes the ids of this figure from those of others on the page.
        values: by row and column.
        shown: a value as text.
        high: the end of the scale; the largest value if None.
        axis: what a column is.
    """
    known = [value for row in values for value in row if value is not None]
    top = max(known, default=1.0) if high is None else high
    left = 12 + _LABEL * max((len(shortened(row)) for row in rows), default=0)
    width, height = left + _CELL * len(columns) + 8, _TOP + _ROW * len(rows) + _AXIS
    parts = []
    for y, (row, line) in enumerate(zip(rows, values, strict=True)):
        at = _TOP + _ROW * y
        label = Markup("<title>{}</title>{}").format(row, shortened(row))
        parts.append(_text(left - 6, at + 10, label, "end"))
        for x, value in enumerate(line):
            place = _rect(left + _CELL * x, at, _CELL - _GAP, _ROW - _GAP)
            if value is None:
                parts.append(Markup('<rect class="none" {}/>').format(place))
            else:
                note, shade = f"{row}, {axis} {columns[x]}: {shown(value)}", level(value, low, top)
                parts.append(Markup('<rect class="s{}" {}><title>{}</title></rect>').format(shade, place, note))
    parts += _ticks(columns, left, _TOP + _ROW * len(rows) + 12, _CELL)
    parts.append(_text(left, height - 4, axis, "start"))
    return _figure(key, title, width, height, parts) + legend(shown(low), shown(top))


def step_bars(
    key: str,
    title: str,
    columns: Sequence[str],
    heights: Sequence[float | None],
    kinds: Sequence[str],
    notes: Sequence[str],
) -> Markup:
    """A bar for each step. Full steps are filled and marked F, others are hatched.

    Args:
        heights: of the bars, in seconds; all bars are alike where none is known.
        kinds: of the steps.
        notes: what is said of each step.
    """
    cell, left, space = 16, 64, 110
    known = [value for value in heights if value is not None]
    top = round_above(max(known, default=0.0))
    parts = [
        Markup(
            '<defs><pattern id="{}-hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><rect class="cache" width="5" height="5"/>'
            '<rect class="stripe" width="1.6" height="5"/></pattern></defs>'
        ).format(key)
    ]
    base = 18 + space
    if known:
        for share in (0, 0.5, 1):
            y = base - space * share
            parts.append(Markup('<path class="grid" d="M{} {:.1f}h{}"/>').format(left, y, cell * len(columns)))
            parts.append(_text(left - 6, y + 4, seconds(top * share), "end"))
    for x, (height, kind, note) in enumerate(zip(heights, kinds, notes, strict=True)):
        tall = space * (0.8 if not known else max(height or 0.0, 0.01 * top) / top)
        full = kind == "full"
        fill = Markup('class="full"') if full else Markup('class="outlined" fill="url(#{}-hatch)"').format(key)
        place = _rect(left + cell * x + 1, base - tall, cell - 3, tall)
        parts.append(Markup("<rect {} {}><title>{}</title></rect>").format(fill, place, note))
        if full:
            parts.append(_text(left + cell * x + cell / 2 - 0.5, base - tall - 4, "F", "middle"))
    parts += _ticks(columns, left, base + 14, cell)
    parts.append(_text(left, base + 30, "step", "start"))
    return _figure(key, title, left + cell * len(columns) + 8, base + 36, parts)


def token_map(key: str, title: str, shares: Sequence[float], columns: int, top: float) -> Markup:
    """The tokens of a picture as cells, `columns` in a row, shaded from 0 to `top`."""
    cells: dict[int, list[str]] = {}
    for place, share in enumerate(shares):
        y, x = divmod(place, columns)
        cells.setdefault(level(share, 0.0, top), []).append(f"M{x} {y}h1v1h-1z")
    rows = -(-len(shares) // columns)
    paths = [
        Markup('<path class="s{}" d="{}"/>').format(shade, "".join(where)) for shade, where in sorted(cells.items())
    ]
    return Markup(
        '<svg class="map" role="img" aria-labelledby="{0}-title" viewBox="0 0 {1} {2}" shape-rendering="crispEdges">'
        '<title id="{0}-title">{3}</title>{4}</svg>'
    ).format(key, columns, rows, title, Markup("").join(paths))


def bar(share: float) -> Markup:
    """A bar for a cell of a table, from 0 to 1. Its value stands beside it."""
    return Markup(
        '<svg class="bar" aria-hidden="true" viewBox="0 0 100 10" preserveAspectRatio="none">'
        '<rect class="rest" width="100" height="10"/><rect class="full" width="{:.2f}" height="10"/></svg>'
    ).format(100 * min(1.0, max(0.0, share)))


def legend(low: str, high: str) -> Markup:
    """The scale of a heat map."""
    shades = Markup("").join(
        Markup('<rect class="s{0}" x="{1}" width="12" height="10"/>').format(i, 12 * i) for i in range(LEVELS)
    )
    scale = Markup('<svg aria-hidden="true" width="{0}" height="10" viewBox="0 0 {0} 10">{1}</svg>')
    return Markup('<p class="legend">{} {} {}</p>').format(low, scale.format(12 * LEVELS, shades), high)


def _figure(key: str, title: str, width: float, height: float, parts: Iterable[Markup]) -> Markup:
    size = Markup('width="{0:.0f}" height="{1:.0f}" viewBox="0 0 {0:.0f} {1:.0f}"').format(width, height)
    return Markup(
        '<div class="wide" tabindex="0" role="group" aria-label="{1}">'
        '<svg role="img" aria-labelledby="{0}-title" {2}><title id="{0}-title">{1}</title>{3}</svg></div>'
    ).format(key, title, size, Markup("").join(parts))


def _ticks(columns: Sequence[str], left: float, y: float, cell: float) -> list[Markup]:
    """Labels of columns, as many as fit."""
    longest = max((len(column) for column in columns), default=1)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if n * cell > 8 * longest + 4 or n == 1000)
    return [
        _text(left + cell * x + cell / 2, y, column, "middle") for x, column in enumerate(columns) if x % every == 0
    ]


def _text(x: float, y: float, text: str | Markup, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _rect(x: float, y: float, width: float, height: float) -> Markup:
    return Markup('x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"').format(x, y, width, height)
