"""What the checks of equivalents share: closeness, random parameters, is an expert row-wise?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from moeca_compile._torch_private import groups_held

# Relative error (L2) between two ways of computing the same: sums in another order, products of other shapes.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_TOLERANCE_TF32 = 5e-3  # float32 on a GPU, where products may be taken in TF32


class UntrustedError(Exception):
    """The equivalent may not stand for the original; the message says why."""


class NoExpertsError(Exception):
    """What looked like experts in the code is none in this module: there is nothing to warn of.

    A message is for where other signs say that there are experts.
    """


def require_row_wise(
    body: Callable[..., Tensor], rows: Sequence[Tensor], tensors: Callable[[], Iterator[Tensor]], tolerance: float
) -> None:
    """Raise UntrustedError unless a body's output for a row depends on that row and its parameters alone.

    body: a function of `rows` (each (T, any width)) to (T, Do); tensors: the parameters and buffers it may change
    """
    before = [tensor.clone() for tensor in tensors()]
    whole, count = body(*rows), len(rows[0])
    if not isinstance(whole, Tensor) or whole.dim() != 2 or len(whole) != count:
        raise UntrustedError("an expert does not turn rows (tokens, width) into rows")
    if not close(body(*rows), whole, tolerance):
        raise UntrustedError("an expert is random or changes from call to call")
    if any(not torch.equal(old, new) for old, new in zip(before, tensors(), strict=True)):
        raise UntrustedError("an expert changes its own parameters or buffers")
    order = torch.randperm(count, device=whole.device)
    parts = torch.cat([body(*(each[:5] for each in rows)), body(*(each[5:] for each in rows))])
    moved = body(*(each[order] for each in rows))
    if not close(moved, whole[order], tolerance) or not close(parts, whole, tolerance):
        raise UntrustedError("an expert's output for a token depends on the other tokens")


def with_random_parameters(module: nn.Module) -> nn.Module:
    """A copy with parameters fit for a comparison: not zero (as before training), not infinite."""
    copied = copy.deepcopy(module, {id(each): each for each in groups_held(module).values()})
    for parameter in copied.parameters():
        if parameter.is_floating_point():
            parameter.normal_(std=max(parameter.shape[-1:], default=1) ** -0.5)
    return copied


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Whether two results are the same but for rounding; infinities and NaN are not."""
    got, want = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (got, want))
    return bool((got - want).norm() <= tolerance * want.norm())


def tolerance_for(tensors: Iterable[Tensor]) -> float:
    """The rounding of the coarsest floating point type that these tensors are computed in."""
    tensors = list(tensors)
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    dtypes |= {dtype for _, dtype in autocast()}
    allowed = max((_TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16]) for dtype in dtypes), default=0.0)
    return max(allowed, _TOLERANCE_TF32) if any(tensor.is_cuda for tensor in tensors) else allowed


def autocast() -> tuple[tuple[str, torch.dtype], ...]:
    """The devices on which autocast is on now, with its dtype."""
    on = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    return tuple((device, torch.get_autocast_dtype(device)) for device in on)
