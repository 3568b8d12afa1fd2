"""One plan a body and layout, and the word that goes out where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence

from torch import Tensor

from moeca_compile.ops import bodies
from moeca_compile.ops.triton.body_plan import BodyPlan, plan_body
from moeca_compile.ops.triton.unsupported import UnsupportedError

_plans: dict[Hashable, BodyPlan | str] = {}
_told: set[str] = set()


def plan_for(body: str, rows: Sequence[Tensor], parameters: Sequence[Tensor], experts: int) -> BodyPlan:
    """The plan of a registered body for these rows and parameters (expert-major). Raises UnsupportedError."""
    own = parameters[: len(parameters) // experts]
    key = (body, tuple((row.shape[1:], row.dtype) for row in rows), _layout(own))
    if key not in _plans:
        try:
            _plans[key] = plan_body(bodies.graph(body), rows, own)
        except UnsupportedError as reason:
            _plans[key] = str(reason)
    plan = _plans[key]
    if isinstance(plan, str):
        raise UnsupportedError(plan)
    return plan


def _layout(parameters: Sequence[Tensor]) -> Hashable:
    return tuple((p.shape, p.stride(), p.dtype) for p in parameters)


def why_not(body: str, rows: Sequence[Tensor], parameters: Sequence[Tensor], experts: int) -> str | None:
    """As `ops.triton.why_not` on CUDA."""
    try:
        plan_for(body, rows, parameters, experts)
    except UnsupportedError as reason:
        return str(reason)
    each = len(parameters) // experts
    if len({_layout(parameters[e * each : (e + 1) * each]) for e in range(experts)}) > 1:
        return "the experts' parameters differ in shape, strides or dtype"
    return None


def tell(op: str, reason: UnsupportedError) -> None:
    """Warn, once for each reason, that an op runs by its ATen function."""
    text = f"moeca: {op} runs without kernels and waits for the device at every step: {reason}"
    if text not in _told:
        _told.add(text)
        warnings.warn(text, stacklevel=4)
