"""`moeca cache`: what earlier compilations have left on disk. What Inductor keeps beside it is left alone."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from moeca_compile.command.named import CommandError
from moeca_compile.disk import store
from moeca_compile.disk.store import Entry
from moeca_compile.text import binary_bytes, count

KINDS = {"export": "exported graphs", "step": "traced steps", "validation": "validations"}
"""What each kind of entry holds."""
NOT_KEPT = "torch keeps nothing on disk here: its caches are turned off, or this version of torch has no such folder"


def info() -> str:
    """Where entries are, how many of each kind, their bytes, formats and ages."""
    where, found = _folder(), store.entries()
    if not found:
        return f"{where}\nnothing is there"
    kinds = Counter(KINDS.get(entry.kind, entry.kind) for entry in found)
    formats = Counter("damaged or unfinished" if e.format is None else f"format {e.format}" for e in found)
    dates = [time.strftime("%Y-%m-%d", time.localtime(of(e.written for e in found))) for of in (min, max)]
    return "\n".join(
        [
            str(where),
            f"{_size(found)}, written {' to '.join(dict.fromkeys(dates))}",
            *(f"  {count(number)} {kind}" for kind, number in sorted(kinds.items())),
            *(f"  {count(number)} of {kind}" for kind, number in sorted(formats.items())),
        ]
    )


def clear(sure: bool) -> str:
    """Remove all entries, after a question unless `sure`. Raises CommandError where nobody can be asked."""
    where, found = _folder(), store.entries()
    if not found:
        return f"{where}\nnothing is there"
    if not sure and not _agreed(f"Remove {_size(found)} in {where}? [y/N] "):
        return "nothing was removed"
    gone = [entry for entry in found if store.remove(entry)]
    left = f"; {len(found) - len(gone)} could not be removed" if len(gone) < len(found) else ""
    return f"removed {_size(gone)}{left}"


def _folder() -> Path:
    where = store.folder()
    if where is None:
        raise CommandError(NOT_KEPT)
    return where


def _size(entries: Sequence[Entry]) -> str:
    noun = "entry" if len(entries) == 1 else "entries"
    return f"{count(len(entries))} {noun}, {binary_bytes(sum(entry.nbytes for entry in entries))}"


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise CommandError("nobody is there to be asked. Give --yes to remove them")
    return input(question).strip().lower() in ("y", "yes")
