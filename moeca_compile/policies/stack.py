"""Stack caching: the change that all blocks together make to the residual stream, h_L - h_0.

A cache step runs the embedding and the head, and adds the cached change between them. Where a model has several token
streams, each that the output is computed from has a cached change of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from moeca_compile.options import Options
from moeca_compile.passes.analysis.axis import offset_in
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.kinds import Part
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.forecast import slots_of
from moeca_compile.policies.policy import CACHING, Policy

Span = tuple[fx.Node, fx.Node]
"""A stream before and after some blocks."""


def declare(options: Options, regions: Regions) -> Sequence[Replacement]:
    """Each stream after the last block: the stream before the first block plus the cached change."""
    return change_replacements(options, regions.stacks, "stack", "stack")


def change_replacements(options: Options, spans: Sequence[Span], name: str, group: str) -> list[Replacement]:
    """For each span, its end as its beginning plus the cached change between the two."""
    named = zip(spans, names_of(name, len(spans)), strict=True)
    return [change_replacement(options, *span, each, group) for span, each in named]


def names_of(name: str, count: int) -> list[str]:
    """Names for so many cached changes."""
    # Not "name" beside "name.1", which is also a slot of a ring of that name.
    return [name] if count == 1 else [f"{name}.{i}" for i in range(count)]


def change_replacement(options: Options, first: fx.Node, last: fx.Node, name: str, group: str) -> Replacement:
    """Replace `last` by `first` plus the cached change between the two."""

    def change(step: Step) -> Tensor:
        return step[last] - _tokens_before(step, first, last)

    def reuse(step: Step) -> Tensor:
        return _tokens_before(step, first, last) + cached.read(step)

    cached = Cached(name, last, Part.WHOLE, slots_of(options, group), options.cache_dtype, change, first)
    return Replacement(last, first, Part.WHOLE, (cached,), reuse, reads=(first,))


def _tokens_before(step: Step, first: fx.Node, last: fx.Node) -> Tensor:
    """The value of `first` on the tokens of `last`, and in its dtype; `first` may have other tokens too."""
    start = offset_in(step.regions.axis(first), step.regions.axis(last)) or 0
    stream: Tensor = step[first]
    # A model in bfloat16 may add positions in float32, and round only then.
    return stream[:, start : start + step.layout(last).tokens].to(last.meta["val"].dtype)


POLICY = Policy(
    reuses="the change over the whole block stack, as it was or extrapolated",
    recipes={"stack": {}, "stack-forecast": {"forecast": ("stack",)}},
    options=CACHING | {"attention_every", "experts_every"},
    declare=declare,
    forecasts=("stack",),
    needs="a residual stream that runs through all blocks",
)
