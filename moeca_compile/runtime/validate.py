"""Validation: every rewritten graph is run on the real first inputs against the original before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeca_compile.policies.step import StepKind
from moeca_compile.runtime.program import Program
from moeca_compile.runtime.record import Record

if TYPE_CHECKING:
    from moeca_compile.runtime.specialisation import Specialisation

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Greatest error that passes. For float32 and float64 it is the greatest difference over the greatest magnitude;
in lower precision a few routings flip by rounding, so there it is the root mean square of both."""


class ValidationError(RuntimeError):
    """A compiled step differs from what it stands for; the model must not use it."""


class Validator:
    """Checks the programs of one specialisation and notes the errors."""

    def __init__(self, shapes: Specialisation, record: Record) -> None:
        self.shapes, self.record = shapes, record

    def check(
        self, kind: StepKind, program: Program, inputs: Sequence[Any], state: dict[str, Tensor], clock: Tensor
    ) -> None:
        """Compare the compiled step with its eager original on copies of the state.

        A full step is compared with the captured model. A cache step is compared with the same step run eagerly,
        which shows what lowering did to it; `recomputed` shows what the rewrite did.
        Raises ValidationError where they differ.
        """
        copies = {name: tensor.clone() for name, tensor in state.items()}
        compiled = program(inputs, copies, clock)
        if kind.full:
            self._compare("full", compiled.outputs, self.shapes.original(inputs))
            if self.shapes.caching:
                self.recomputed(inputs, {**copies, **compiled.updates}, compiled.outputs)
            return
        eager = self.shapes.eager(kind, inputs, state, clock)
        self._compare("cache", compiled.outputs, eager.outputs)

    def recomputed(self, inputs: Sequence[Any], state: dict[str, Tensor], outputs: Sequence[Any]) -> None:
        """A cache step with everything recomputed, right after a full step, must equal the full step."""
        if self.shapes.config.family != "moeca" or not self.shapes.regions.experts:
            return
        forced = StepKind(attention=False, experts=False, capacity=self.shapes.plan.sizes[1], forced=True)
        result = self.shapes.eager(forced, inputs, state, self.shapes.clock([[0.0, 0.0], [0.0, 0.0]]))
        self._compare("recomputed", result.outputs, outputs)

    def _compare(self, check: str, found: Sequence[Any], wanted: Sequence[Any]) -> None:
        for one, other in zip(found, wanted, strict=True):
            if isinstance(one, Tensor) and one.is_floating_point():
                error = relative_error(one, other)
                self.record.worst(check, error)
                allowed = self.shapes.config.tolerance or TOLERANCE.get(one.dtype, 1e-4)
                if not error <= allowed:
                    raise ValidationError(f"{check} step: error {error:.2e} exceeds {allowed:.0e}")


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Error of `found` relative to the scale of `wanted` (see TOLERANCE for which measure)."""
    difference, scale = (found - wanted).double(), wanted.double()
    if found.dtype in (torch.float32, torch.float64):
        return float(difference.abs().max() / scale.abs().max().clamp_min(1e-30))
    return float(difference.square().mean().sqrt() / scale.square().mean().sqrt().clamp_min(1e-30))
