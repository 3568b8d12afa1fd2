"""A line that says how far compilation is: on a terminal by rich, where that is installed, else in the log.

moeca: full step, lower, part 3 of 6, 12 s
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moeca_compile.text import seconds

_log = logging.getLogger(__name__)


class Progress:
    """What is being compiled, and since when.

    Args:
        quiet: show nothing.

    Attributes:
        outcome: what it is in the end, if not compiled.
    """

    def __init__(self, quiet: bool = True) -> None:
        self.quiet = quiet
        self.what = self.stage = self.parts = ""
        self.outcome = "compiled"
        self.since = 0.0
        self._line: Any = None

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Show a line while `what` is compiled."""
        if self.quiet or self._line is not None:
            yield
            return
        self.what, self.stage, self.parts, self.since = what, "", "", time.perf_counter()
        self.outcome = "compiled"
        self._line = _line_on_terminal(self)
        try:
            yield
        finally:
            line, self._line = self._line, None
            _quietly(line.stop)
            _log.info("%s %s in %s", what, self.outcome, seconds(time.perf_counter() - self.since))

    def enter(self, stage: str) -> None:
        """A stage begins."""
        self._now(stage, "")

    def part(self, number: int, count: int) -> None:
        """Part `number` of `count` of the stage begins."""
        self._now(self.stage, f"part {number} of {count}")

    def say(self, text: str) -> None:
        """Have the log say something that holds beyond what is being compiled."""
        if not self.quiet:
            _log.info("%s", text)

    def _now(self, stage: str, parts: str) -> None:
        self.stage, self.parts = stage, parts
        if self._line is not None:
            _log.info("%s", self)

    def __str__(self) -> str:
        spent = f"{time.perf_counter() - self.since:.0f} s"
        return ", ".join(filter(None, [self.what, self.stage, self.parts, spent]))

    def __rich__(self) -> str:
        return f"moeca: {self}"


class _NoLine:
    def stop(self) -> None:
        """There is nothing to take away."""


def _line_on_terminal(progress: Progress) -> Any:
    """A line that rich draws again several times a second, so that its seconds count on."""
    try:
        if not sys.stderr.isatty():
            return _NoLine()
        from rich.console import Console

        line = Console(stderr=True).status(progress)
        line.start()
        return line
    except Exception:  # no rich, no terminal, another line of the user's: nothing that should stop a compilation
        _log.debug("no progress is shown", exc_info=True)
        return _NoLine()


def _quietly(stop: Any) -> None:
    try:
        stop()
    except Exception:
        _log.debug("the line of progress could not be taken away", exc_info=True)
