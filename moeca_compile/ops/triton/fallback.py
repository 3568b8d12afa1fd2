"""What runs where the kernels cannot: the ATen function, and a word about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import Tensor

from moeca_compile.ops.body_plan import layout
from moeca_compile.ops.body_run import by_expert
from moeca_compile.ops.triton.body_plan import kernel_plan
from moeca_compile.ops.unsupported import UnsupportedError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_warned: set[str] = set()


def or_by_aten(
    reference: Callable[_Arguments, _Result],
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Run `reference`, and warn once for each reason, where the decorated op raises UnsupportedError.

    The op has to raise it before it writes to any of its arguments.
    """

    def decorate(op: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @wraps(op)
        def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            try:
                return op(*args, **kwargs)
            except UnsupportedError as reason:
                _warn(f"moeca: {op.__name__} runs without kernels and waits for the device at every step: {reason}")
                return reference(*args, **kwargs)

        return run

    return decorate


def _warn(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=4)


def why_not(body: str, rows: Sequence[Tensor], parameters: Sequence[Tensor], experts: int) -> str | None:
    """As `ops.triton.why_not` on CUDA."""
    try:
        kernel_plan(body, rows, parameters, experts)
    except UnsupportedError as reason:
        return str(reason)
    if len({layout(each) for each in by_expert(parameters, experts)}) > 1:
        return "the experts' parameters differ in shape, strides or dtype"
    return None
