"""What capture met and left as it was, and why: one warning each, and a list for the report."""

from __future__ import annotations

import warnings
from typing import NamedTuple


class CaptureWarning(UserWarning):
    """A MoE layer is compiled as plain torch.compile would, often with graph breaks, and without caching."""


class Refusal(NamedTuple):
    """where: "file:line" of the method; method: its qualified name; reason: a sentence."""

    where: str
    method: str
    reason: str


_refusals: dict[Refusal, None] = {}  # in order, each once


def refusals() -> tuple[Refusal, ...]:
    """The methods that capture left as they were in this process, in the order in which they were met."""
    return tuple(_refusals)


def refuse(refusal: Refusal, advice: str) -> None:
    """Record `refusal`; warn the first time that its method is refused."""
    known = any(other[:2] == refusal[:2] for other in _refusals)
    _refusals.setdefault(refusal)
    if not known:
        message = (
            f"{refusal.where}: {refusal.method} runs as torch.compile would run it, and nothing of it is "
            f"cached: {refusal.reason}. {advice}"
        )
        file, _, line = refusal.where.rpartition(":")
        warnings.warn_explicit(message, CaptureWarning, file, int(line))


def forget_refusals() -> None:
    """Forget them all, so that each would be warned of again. For tests."""
    _refusals.clear()
