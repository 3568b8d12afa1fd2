"""Block cache: the first blocks run at every step, and decide whether the others do.

With r the change that the first n blocks make to the residual stream, and r_full that of the last full step,

    D = mean|r - r_full| / (mean|r_full| + 1e-6).

Below the threshold the cached change of the other blocks is reused, and the last m blocks run on the sum.

Source: DBCache of cache-dit, and with n = 1 the First-Block cache of ParaAttention and diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from moeca_compile.options import Options
from moeca_compile.passes.analysis.graph import ancestors
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.kinds import Part
from moeca_compile.passes.rewrite.probe import Probe, relative_change
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies.block import blocks_of
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.criterion import Criterion, Decides, Signal, StepAt
from moeca_compile.policies.policy import DECIDING, Policy
from moeca_compile.policies.stack import change_replacement

_BEFORE = "first_change"


def declare(options: Options, regions: Regions) -> Sequence[Replacement]:
    """Of each stream, the change between the first n blocks and the last m. That of the first n is kept beside it."""
    spans = spans_of(options, regions)
    names = ["middle"] if len(spans) == 1 else [f"middle.{number}" for number in range(len(spans))]
    found = [
        change_replacement(options, span.first, span.last, name, "stack")
        for span, name in zip(spans, names, strict=True)
    ]
    if not found:
        return []
    start, first = _deciding(spans, regions)
    kept = Cached(_BEFORE, first, Part.WHOLE, False, None, lambda step: first_change(step, start, first), start)
    return [replace(found[0], caches=(*found[0].caches, kept)), *found[1:]]


def probe(options: Options, regions: Regions) -> Probe:
    """How far the change of the first n blocks is from that at the last full step. Their streams are handed on."""
    spans = spans_of(options, regions)
    start, first = _deciding(spans, regions)

    def signal(step: Step) -> Tensor:
        return relative_change(first_change(step, start, first), step.state[_BEFORE])

    ends = [end for chain in chains_from_inputs(regions) if (end := _end(chain, options.first_blocks)) is not None]
    return Probe(signal, reads=(start, first), handed_on=tuple(dict.fromkeys([start, *ends])))


def first_change(step: Step, start: fx.Node, first: fx.Node) -> Tensor:
    """What the first n blocks have added to the stream."""
    change: Tensor = step[first] - step[start]
    return change


@dataclass(frozen=True)
class Span:
    """A stream before its first block, after the first n, before the last m."""

    start: fx.Node
    first: fx.Node
    last: fx.Node


def spans_of(options: Options, regions: Regions) -> list[Span]:
    """Of each stream that the output is computed from; none where one of them has too few blocks."""
    chains = {chain[0]: chain for chain in chains_from_inputs(regions)}
    found = []
    for start, end in regions.stacks:
        chain = chains.get(start, [])
        first = _end(chain, options.first_blocks)
        last = _before_last(chain, end, options.last_blocks) if first is not None else None
        if first is None or last is None or not first < last:
            return []
        found.append(Span(start, first, last))
    return found


def chains_from_inputs(regions: Regions) -> list[list[fx.Node]]:
    """Of each token stream that begins before all blocks: the stream before its first block, and after each block."""
    after = dict(blocks_of(regions))
    adds = {residual.add for residual in regions.residuals}
    starts = [start for start in after if adds.isdisjoint(ancestors([start]))]
    chains = []
    for start in starts:
        chain = [start]
        while chain[-1] in after:
            chain.append(after[chain[-1]])
        chains.append(chain)
    return chains


def _end(chain: Sequence[fx.Node], blocks: int) -> fx.Node | None:
    """The stream after so many blocks."""
    return chain[blocks] if blocks < len(chain) else None


def _before_last(chain: Sequence[fx.Node], end: fx.Node, blocks: int) -> fx.Node | None:
    """The stream before the last blocks. Where streams are joined on the way, the rest is replaced as a whole."""
    if not blocks:
        return end
    return chain[-1 - blocks] if chain[-1] is end and blocks < len(chain) else None


def _deciding(spans: Sequence[Span], regions: Regions) -> tuple[fx.Node, fx.Node]:
    """The ends of the first blocks of the stream that decides: the picture's, which is the largest."""
    start, _ = regions.main_stack
    return next((span.start, span.first) for span in spans if span.start is start)


class Compared(Criterion):
    """The first blocks make another change than at the last full step."""

    def exceeds(self, at: StepAt, signal: Signal) -> bool:
        return not signal() < self.options.reuse_threshold  # so that NaN is full


POLICY = Policy(
    reuses="the change of all blocks but the first, while that of the first is like at the last full step (DBCache)",
    recipes={"block-cache": {"reuse_threshold": 0.08}},
    options=DECIDING | {"first_blocks", "last_blocks", "warmup_steps", "forecast", "forecast_slope"},
    declare=declare,
    forecasts=("stack",),
    needs="more blocks than first_blocks and last_blocks together",
    decides=Decides(Compared, probe),
)
