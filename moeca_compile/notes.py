"""What compiling and running a model records: seconds by stage, errors by check, warnings."""

from __future__ import annotations

import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from moeca_compile.passes.runner import PassResult
from moeca_compile.progress import Progress

_log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What a validation noted: its errors by check, and whether it warned of anything, for the first time or not."""

    errors: dict[str, float] = field(default_factory=dict)
    warned: bool = False


@dataclass
class Notes:
    """What a report is made from. Each warning is issued once, when it first occurs."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    errors: dict[str, float] = field(default_factory=dict)
    matches: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """How many places each normalizing pass rewrote."""
    warnings: list[str] = field(default_factory=list)

    from_disk: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """How much of what was found out or compiled was on disk from before, by kind."""
    parts: int = 0
    """How many parts of steps were compiled."""
    parts_beside: int = 0
    """How many of them another process compiled, while their steps ran op by op."""
    early_runs: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """How often steps ran before they were compiled, by kind."""
    progress: Progress = field(default_factory=Progress)
    _outcomes: list[Outcome] = field(default_factory=list)

    @contextmanager
    def watched(self) -> Iterator[Outcome]:
        """What is noted inside."""
        outcome = Outcome()
        self._outcomes.append(outcome)
        try:
            yield outcome
        finally:
            self._outcomes = [other for other in self._outcomes if other is not outcome]

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage of the compilation."""
        start = time.perf_counter()
        self.progress.enter(stage)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] += spent
            _log.debug("%s: %.3f s", stage, spent)

    def add_matches(self, results: Iterable[PassResult]) -> None:
        """Add up how many places the normalizing passes rewrote."""
        for result in results:
            self.matches[result.name] += result.matches

    def warn(self, text: str) -> None:
        for outcome in self._outcomes:
            outcome.warned = True
        if text not in self.warnings:
            self.warnings.append(text)
            warnings.warn(f"moeca: {text}", stacklevel=3)

    def worst(self, check: str, error: float) -> None:
        """Record an error of a check; the largest one counts."""
        for errors in (self.errors, *(outcome.errors for outcome in self._outcomes)):
            errors[check] = max(error, errors.get(check, 0.0))
