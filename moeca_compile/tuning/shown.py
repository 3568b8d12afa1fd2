"""How far a tune is: by rich where that is installed and somebody looks, else in the log."""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import Any

_log = logging.getLogger(__name__)


class Shown:
    """What is being measured, as a line with a bar.

    Args:
        wanted: False shows nothing.
    """

    def __init__(self, wanted: bool) -> None:
        self._bar: Any = _bar() if wanted else None
        self._task: Any = None

    def __enter__(self) -> Shown:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, what: str, runs: int) -> None:
        """Something of so many generations begins."""
        _log.info("%s, %d generations", what, runs)
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=runs)

    def advance(self) -> None:
        """One of its generations has run."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)

    def say(self, text: str) -> None:
        """A line that stays."""
        _log.info("%s", text)
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)


def _bar() -> Any:
    try:
        if not sys.stderr.isatty():
            return None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    columns = (TextColumn("moeca: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
