"""Tables as text."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from io import StringIO

from moeca_compile.text import aligned

WIDE = 200
"""Columns of a table that goes to a file or a pipe."""


def framed(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as rich draws it, within the terminal's width; without rich, as aligned columns.

    All columns but the first are numbers, which end at the same place.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return "\n".join(aligned([headings, *rows]))
    table = Table()
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE
    written = StringIO()
    Console(file=written, width=width, markup=False, highlight=False).print(table)
    return written.getvalue().rstrip("\n")
