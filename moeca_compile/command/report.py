"""`moeca report`: a report that was saved, as text or as a page."""

from __future__ import annotations

import json
from pathlib import Path

from moeca_compile.command.named import CommandError
from moeca_compile.reporting.report import Report
from moeca_compile.reporting.save import target


def shown(file: str) -> str:
    """The report as text. Raises CommandError where the file holds none."""
    return str(_read(file))


def written(file: str, out: str) -> str:
    """Write the report's page, and say where. Raises CommandError where it cannot be written."""
    try:
        where = target(out)
        if where.suffix.lower() != ".html":
            raise CommandError(f"{out!r}: the name must end in .html")
        report = _read(file)
        report.save(where)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    return f"wrote {where}"


def _read(file: str) -> Report:
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CommandError(f"there is no file {file!r}") from error
    except OSError as error:
        raise CommandError(f"{file!r} cannot be read: {error.strerror}") from error
    except ValueError as error:  # no JSON, or no text
        raise CommandError(f"{file!r} is no JSON: write it by report(model).save('report.json')") from error
    try:
        return Report.from_dict(values)
    except ValueError as error:
        raise CommandError(f"{file!r}: {error}") from error
