"""What capture met and left as it was, and why: one warning each, and a list for the report."""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary


class CaptureWarning(UserWarning):
    """A MoE layer is compiled as plain torch.compile would, often with graph breaks, and without caching."""


class Refusal(NamedTuple):
    """where: "file:line" of the method; method: its qualified name; reason: a sentence."""

    where: str
    method: str
    reason: str


_refusals: dict[Refusal, WeakIdKeyDictionary] = {}  # in order, each once, with the layers that it was said of


def refusals(model: nn.Module | None = None) -> tuple[Refusal, ...]:
    """The methods that capture left as they were, in the order in which they were met.

    Args:
        model: of whose layers; of all that were met in this process where it is None.
    """
    if model is None:
        return tuple(_refusals)
    modules = list(model.modules())
    return tuple(refusal for refusal, layers in _refusals.items() if any(each in layers for each in modules))


def refuse(refusal: Refusal, layer: nn.Module, advice: str) -> None:
    """Record `refusal` of a method of `layer`; warn the first time that its method is refused."""
    known = any(other[:2] == refusal[:2] for other in _refusals)
    _refusals.setdefault(refusal, WeakIdKeyDictionary())[layer] = True
    if not known:
        message = (
            f"{refusal.where}: {refusal.method} runs as torch.compile would run it, and nothing of it is "
            f"cached: {refusal.reason}. {advice}"
        )
        file, _, line = refusal.where.rpartition(":")
        warnings.warn_explicit(message, CaptureWarning, file, int(line))


@functools.cache
def warn_once(text: str) -> None:
    """Warn of a fault of capture itself, once in this process."""
    warnings.warn(f"moeca: {text}", stacklevel=3)


def forget_refusals() -> None:
    """Forget them all, so that each would be warned of again. For tests."""
    _refusals.clear()
    warn_once.cache_clear()
