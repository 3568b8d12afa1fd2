"""Write a report to a file: its page, or its plain values."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeca_compile.reporting.page import page_of

_FORMS = (".html", ".json")


def target(path: str | os.PathLike[str]) -> Path:
    """The file to write. Raises ValueError for a name that says no form, OSError where there is no such folder."""
    where = Path(path).expanduser()
    if where.suffix.lower() not in _FORMS:
        raise ValueError(f"{str(path)!r}: the name must end in {' or '.join(_FORMS)}")
    if not where.parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r}: there is no folder {where.parent}")
    if where.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder. Name a file in it")
    return where


def save(values: Mapping[str, Any], where: Path) -> None:
    """Write a report's plain values to a `target`."""
    text = page_of(values) if where.suffix.lower() == ".html" else json.dumps(values, indent=1) + "\n"
    where.write_text(text, encoding="utf-8")
