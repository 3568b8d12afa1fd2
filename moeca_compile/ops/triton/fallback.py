"""Run the ATen function, with a warning, where the kernels cannot run an op."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
_refused = False


def or_by_aten(
    reference: Callable[_Arguments, _Result],
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Decorate an op: if it raises UnsupportedError, run `reference` instead and warn once for each reason.

    The op must raise before it writes to any of its arguments.
    """

    def decorate(op: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @wraps(op)
        def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            try:
                return op(*args, **kwargs)
            except UnsupportedError as reason:
                if _refused:
                    raise
                _warn(
                    f"moeca: {op.__name__} runs without kernels ({reason}). It waits for the device at every step, "
                    "which is slower. docs/limits.md says which experts the kernels can run"
                )
                return reference(*args, **kwargs)

        return run

    return decorate


@contextmanager
def refused() -> Iterator[None]:
    """Inside, an op that the kernels cannot run raises UnsupportedError: the ATen function does not run instead."""
    global _refused
    before, _refused = _refused, True
    try:
        yield
    finally:
        _refused = before


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
