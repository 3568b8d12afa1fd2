"""What is known of one compiled model: its graphs, breaks, counters and warnings; reports are made from it."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moeca_compile.config import MoecaConfig

if TYPE_CHECKING:
    from moeca_compile.runtime.engine import Engine


@dataclass
class Record:
    """Kept on the object that `torch.compile` made, so it lives and dies with the compiled model."""

    config: MoecaConfig
    engines: list[Engine] = field(default_factory=list)
    untouched: int = 0
    """Graphs that run as torch.compile would run them."""
    breaks: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    errors: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage of the compilation."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def warn(self, text: str) -> None:
        """Warn once, and keep the text for the report."""
        if text not in self.warnings:
            self.warnings.append(text)
            warnings.warn(f"moeca: {text}", stacklevel=3)

    def worst(self, check: str, error: float) -> None:
        """Keep the greatest error of a validation."""
        self.errors[check] = max(error, self.errors.get(check, 0.0))


_ATTRIBUTE = "_moeca_record"


def record_of(wrapper: Any) -> Record | None:
    """The record of a compiled model, by the object that torch.compile made for it."""
    return getattr(wrapper, _ATTRIBUTE, None)


def attach(wrapper: Any, record: Record) -> Record:
    """Keep `record` on the wrapper."""
    setattr(wrapper, _ATTRIBUTE, record)
    return record
