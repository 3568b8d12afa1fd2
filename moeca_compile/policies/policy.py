"""What a policy is: the recipes that it serves, the options that it heeds, and what it declares for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeca_compile.options import Options
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.replacement import Replacement

ALWAYS = frozenset({"validate", "tolerance", "cuda_graphs", "lowering", "dump"})
"""Options that every recipe heeds."""
CACHING = ALWAYS | {"full_every", "full_steps", "forecast", "max_generations", "cache_dtype"}
"""Options that every recipe with caches heeds."""


def _nothing_ignored(options: Options) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True)
class Policy:
    """One way of caching.

    Attributes:
        reuses: what a cache step reuses, in a few words, for documents.
        recipes: the recipes that it serves, each with the values of options that are left unset.
        options: the options that it heeds; any other is refused.
        declare: the replacements for the regions of a model; none where there is nothing that it could cache.
        forecasts: the groups of caches that may be forecast (option `forecast`).
        needs: what a model must have for it, in the words of a warning; applies: whether the regions have that.
        ignored: options that have no effect beside the values of others, each with the reason.
    """

    reuses: str
    recipes: Mapping[str, Mapping[str, Any]]
    options: frozenset[str]
    declare: Callable[[Options, Regions], Sequence[Replacement]]
    forecasts: tuple[str, ...] = ()
    needs: str = "attention or feed-forwards around a residual stream"
    applies: Callable[[Regions], bool] = lambda regions: True
    ignored: Callable[[Options], Mapping[str, str]] = _nothing_ignored

    @property
    def declares_nothing(self) -> bool:
        """Whether it caches nothing in any model."""
        return "full_every" not in self.options


def replaced_schedule(options: Options) -> Mapping[str, str]:
    """`full_every` beside an explicit list of full steps."""
    return {"full_every": "full_steps lists the full steps, so it has no effect"} if options.full_steps else {}
