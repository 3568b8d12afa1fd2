"""What the compiler is expected to find in a generated model, as the strategy knows it.

UNCACHED is the one table of what is not cached, each with the reason that the report must give. A MoE layer that is
not cached, for whatever else but these, is a fault of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeca_compile.reporting.collect import AT_EVERY_STEP, UNPROVEN
from tests.variants.attention import Attending
from tests.variants.blocks import Blocking, Modelling
from tests.variants.dispatch import Layering
from tests.variants.pairs import PAIRED
from tests.variants.simulation import Understood

NOT_TOLD = ""
"""For attentions that are not told apart from other work, so that the report does not name them."""

UNCACHED_ATTENTION: tuple[tuple[Callable[[Attending], bool], str], ...] = ()

UNCACHED_EXPERTS: tuple[tuple[Callable[[Blocking], bool], str], ...] = ()

COUPLED = "it routes the samples of a batch together, so a sample's result depends on the others"
IDLE = "the recipe needs MoE layers, and none is cached"


@dataclass(frozen=True)
class Expected:
    """Of each block: why its attention and its feed-forward are skipped, None where they are cached."""

    attention: tuple[str | None, ...]
    feedforward: tuple[str | None, ...]

    @property
    def understood(self) -> Understood:
        return Understood(
            tuple(reason is None for reason in self.attention),
            tuple(reason is None for reason in self.feedforward),
        )


def expected(how: Modelling) -> Expected:
    attention = tuple(_first(UNCACHED_ATTENTION, block.attending) for block in how.blocks)
    feedforward = tuple(_first(UNCACHED_EXPERTS, block) for block in how.blocks)
    experts = [isinstance(block.feedforward, Layering) for block in how.blocks]
    if not any(has and reason is None for has, reason in zip(experts, feedforward, strict=True)):
        attention, feedforward = (
            tuple(IDLE if r is None else r for r in reasons) for reasons in (attention, feedforward)
        )
    return Expected(attention, feedforward)


def _first(table: tuple[tuple[Callable[..., bool], str], ...], part: object) -> str | None:
    return next((reason for applies, reason in table if applies(part)), None)


def regions(
    how: Modelling, options: Mapping[str, Any], empty: frozenset[int] = frozenset()
) -> list[tuple[str, str, str]]:
    """(kind, status, reason) of every region of the report, sorted; empty: blocks whose layer took no token yet."""
    want, found = expected(how), []
    shared = AT_EVERY_STEP if options.get("shared") == "always" else None
    parts = zip(how.blocks, want.attention, want.feedforward, strict=True)
    for number, (block, attention, feedforward) in enumerate(parts):
        if attention != NOT_TOLD:
            found.append(region("attention", attention))
        if not isinstance(block.feedforward, Layering):
            found += [region("feedforward", feedforward)] if feedforward in (None, IDLE) else []
        elif feedforward is None:
            routed_together = COUPLED if coupled(block.feedforward, how) else ""
            found += [
                ("router", "cached", UNPROVEN if number in empty else routed_together),
                ("experts", "cached", UNPROVEN if number in empty else ""),
            ]
            found += [region("feedforward", shared) for _ in block.feedforward.shared]
        else:
            found.append(region("experts", feedforward))
    return sorted(found)


def coupled(layer: Layering, how: Modelling) -> bool:
    """Whether a sample's routing depends on the others; not so where experts take a fixed number, and that is all."""
    if layer.dispatch not in PAIRED or not PAIRED[layer.dispatch].coupled or how.batch == 1:
        return False
    return PAIRED[layer.dispatch].by_the_data or layer.routing.top_k < layer.routing.experts


def region(kind: str, reason: str | None) -> tuple[str, str, str]:
    return (kind, "cached", "") if reason is None else (kind, "skipped", reason)
