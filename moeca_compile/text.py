"""Numbers and errors as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(value) >= base and step < len(units) - 1:
        value, step = value / base, step + 1
    digits = f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
    return f"{digits} {units[step]}"


def binary_bytes(number: int) -> str:
    """Bytes in powers of 1024: 1536 -> "1.5 KiB"."""
    return _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def flop_count(number: float) -> str:
    """Floating-point operations in powers of 1000: 2.5e9 -> "2.5 GFLOP"."""
    return _scaled(number, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def seconds(time: float) -> str:
    """Seconds, or milliseconds below one second: 0.25 -> "250 ms"."""
    return f"{time:.1f} s" if time >= 1 else f"{1000 * time:.0f} ms"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


def count(number: float) -> str:
    """A count, or a mean of counts with one decimal where it is not whole."""
    return f"{number:,.0f}" if number == round(number) else f"{number:,.1f}"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines in which the cells of a column begin at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def remarks_once(found: Iterable[tuple[str, Iterable[str]]], between: str = ", ") -> Iterator[str]:
    """Each remark once, after the names of those that have it; found: (name, its remarks)."""
    names: dict[str, list[str]] = {}
    for name, remarks in found:
        for remark in remarks:
            names.setdefault(remark, []).append(name)
    for remark, having in names.items():
        yield f"{between.join(having)}: {remark}"


def first_line(error: BaseException) -> str:
    """An exception in one line: its type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
