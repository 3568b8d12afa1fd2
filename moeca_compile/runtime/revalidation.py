"""Validation that said nothing is made again, once it can say something.

It says nothing where the model's first outputs are not finite, or where gates are zero, so that whatever is cached is
right. Then weights that are loaded later could go wrong unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from moeca_compile._torch_private import version_of
from moeca_compile.lower.validate import all_finite
from moeca_compile.notes import Notes
from moeca_compile.runtime.loop import StepLoop

NOT_FINITE = (
    "the model's outputs had infinities or NaNs in its first {0} calls, so the rewritten model could not be "
    "validated. It runs uncached until its outputs are finite"
)
_NOT_FINITE_CALLS = 8


class Loops(Protocol):
    """The step loops of a graph, by input shapes."""

    notes: Notes

    @property
    def of_model(self) -> Sequence[int]:
        """The positions of inputs that are no weights."""

    def loop_for(self, inputs: Sequence[Any]) -> StepLoop:
        """The loop of these inputs; new shapes are compiled and validated."""

    def forget(self, loop: StepLoop) -> None:
        """Drop a loop, so that the next call compiles and validates anew."""


def call_unproven(loops: Loops, loop: StepLoop, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """A call of the model; before it or after it, validation is made again where that may say more now."""
    regions = loop.compiled.regions
    if regions.unproven and _versions(loops, loop, inputs) != loop.validated_with:
        loops.forget(loop)
        loop = loops.loop_for(inputs)
        loop.validated_with = _versions(loops, loop, inputs)
        return loop(inputs)
    outputs = loop(inputs)
    if loop.validated_with is None:
        loop.validated_with = _versions(loops, loop, inputs)
    if not regions.finite:
        if all_finite(outputs):
            loops.forget(loop)
        elif loop.tallies.steps >= _NOT_FINITE_CALLS:
            loops.notes.warn(NOT_FINITE.format(_NOT_FINITE_CALLS))
    return outputs


def _versions(loops: Loops, loop: StepLoop, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """What changes with the weights, but for those that the model itself changes at every call."""
    own = {*loops.of_model, *loop.compiled.mutated}
    weights = [v for i, v in enumerate(inputs) if i not in own and isinstance(v, Tensor)]
    return tuple((v.data_ptr(), version_of(v)) for v in weights)
