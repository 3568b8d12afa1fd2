"""Random arguments for the check of a method, and how its results are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeca_compile.capture.idioms.base import Facts
from moeca_compile.capture.numerics import UntrustedError, close

TRIAL_SIZE = 3  # of a dimension that varies from call to call


def random_argument(
    described: Sequence[Any], num_experts: int | None, same: bool, generator: torch.Generator
) -> Tensor:
    """A random argument of (sizes, dtype, device); expert ids if there is a number of experts.

    same: all tokens are alike, and have the same experts: these take as many rows as any can, and others none.
    """
    sizes, dtype, device = described
    shape = [TRIAL_SIZE if size is None else size for size in sizes]
    count = torch.Size(shape).numel()
    if num_experts is not None:
        used = num_experts
        if same:  # of ids in one dimension nobody knows how many a token has
            used = min(shape[-1], used) if len(shape) > 1 else max(used - 1, 1)
        order = torch.randperm(num_experts, generator=generator)[:used]
        return order[torch.arange(count) % len(order)].reshape(shape).to(device, dtype)
    if not dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(device, dtype)
    value = torch.randn(shape, generator=generator)
    if same and len(shape) > 1:
        value = value.reshape(-1, shape[-1])[:1].expand(count // shape[-1], -1).reshape(shape).clone()
    return value.to(device, dtype)


def arguments_like(
    facts: Facts, tensor_for: Callable[[int | str, Sequence[Any]], Tensor]
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments for a call of these facts; `tensor_for` makes the tensors."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for key, is_tensor, *described in facts:
        value = tensor_for(key, described) if is_tensor else described[0]
        if isinstance(key, int):
            args.append(value)
        else:
            kwargs[key] = value
    return args, kwargs


def with_rows(value: Any, numbers: Callable[[int], Tensor]) -> Any:
    """A tensor of so many rows with those of these `numbers` in their places; any other value as it is."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    rows = value.flatten(0, -2)
    return rows[numbers(len(rows)).to(rows.device)].view_as(value)


def one_apart(count: int) -> Tensor:
    """The first row once, and the second in the place of all others."""
    return torch.arange(count).clamp(max=1)


def without_side_effects(
    original: Callable[..., Any], module: nn.Module, args: list[Any], kwargs: dict[str, Any]
) -> list[Any]:
    """What the original returns. Raises UntrustedError, with the buffers as before, if it changes them."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    result = original(module, *cloned(args), **kwargs)
    changed = [(buffer, old) for buffer, old in before if not torch.equal(buffer, old)]
    for buffer, old in changed:
        buffer.copy_(old)
    if changed:
        raise UntrustedError("it changes its own buffers")
    return leaves(result)


def leaves(result: Any) -> list[Any]:
    """The parts of a result in order: tuples, lists and dicts are taken apart, all else stays whole."""
    if isinstance(result, dict):
        result = list(result.values())
    if not isinstance(result, (tuple, list)):
        return [result]
    return [leaf for each in result for leaf in leaves(each)]


def cloned(args: Sequence[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else value for value in args]


def kind(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)


def equal(got: Any, want: Any, tolerance: float) -> bool:
    if not isinstance(got, Tensor):
        return bool(got == want)
    return close(got, want, tolerance) if got.dtype.is_floating_point else torch.equal(got, want)


def finite(leaf: Any) -> bool:
    return not isinstance(leaf, Tensor) or bool(leaf.isfinite().all())
