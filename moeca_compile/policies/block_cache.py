"""Block cache: the first blocks run at every step, and decide whether the others do.

With r the change that the first n blocks make to the residual stream, and r_full that of the last full step,

    D = mean|r - r_full| / (mean|r_full| + 1e-6).

Below the threshold the cached change of the other blocks is reused, and the last m blocks run on the sum.

Source: DBCache of cache-dit, and with n = 1 the First-Block cache of ParaAttention and diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, fx

from moeca_compile.options import Options
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.kinds import Part
from moeca_compile.passes.rewrite.probe import Probe, relative_change
from moeca_compile.passes.rewrite.replacement import Replacement
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.criterion import Criterion, Decides, Signal, StepAt
from moeca_compile.policies.depth import depth_of, spans
from moeca_compile.policies.policy import DECIDING, FORECASTING, Policy
from moeca_compile.policies.stack import Span, change_replacements

_BEFORE = "first_change"


def declare(options: Options, regions: Regions) -> Sequence[Replacement]:
    """Of each stream, the change between the first n blocks and the last m. That of the first n is kept beside it."""
    middle = spans(regions, options.first_blocks, depth_of(regions) - options.last_blocks)
    found = change_replacements(options, middle, "middle", "stack")
    if not found or not spans(regions, 0, options.first_blocks):
        return []
    start, first = _deciding(options, regions)
    kept = Cached(_BEFORE, first, Part.WHOLE, 1, None, lambda step: first_change(step, start, first), start)
    return [replace(found[0], caches=(*found[0].caches, kept)), *found[1:]]


def probe(options: Options, regions: Regions) -> Probe:
    """How far the change of the first n blocks is from that at the last full step. Their streams are handed on."""
    start, first = _deciding(options, regions)

    def signal(step: Step) -> Tensor:
        return relative_change(first_change(step, start, first), step.state[_BEFORE])

    ends = [end for _, end in spans(regions, 0, options.first_blocks)]
    return Probe(signal, reads=(start, first), handed_on=tuple(dict.fromkeys([start, *ends])))


def first_change(step: Step, start: fx.Node, first: fx.Node) -> Tensor:
    """What the first n blocks have added to the stream."""
    change: Tensor = step[first] - step[start]
    return change


def _deciding(options: Options, regions: Regions) -> Span:
    """The first blocks of the stream that decides: the picture's, which is the largest."""
    main, _ = regions.main_stack
    return next(span for span in spans(regions, 0, options.first_blocks) if span[0] is main)


class Compared(Criterion):
    """The first blocks make another change than at the last full step."""

    def exceeds(self, at: StepAt, signal: Signal) -> bool:
        return not signal() < self.options.reuse_threshold  # so that NaN is full


POLICY = Policy(
    reuses="the change of all blocks but the first, while that of the first is like at the last full step (DBCache)",
    recipes={"block-cache": {"reuse_threshold": 0.08}},
    options=DECIDING | FORECASTING | {"first_blocks", "last_blocks", "warmup_steps"},
    declare=declare,
    forecasts=("stack",),
    needs="more blocks than first_blocks and last_blocks together",
    decides=Decides(Compared, probe),
)
