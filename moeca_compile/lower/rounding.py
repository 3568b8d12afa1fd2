"""Tell rounding from a fault: errors by row, held against what rounding does to the same computation.

In 16 bits no fixed bound separates the two. Rounding alone moves a value by a percent or more, and where two experts
score almost the same it sends a token to the other one. So, where errors exceed what a few roundings can explain, the
computation is repeated with a random relative error added to each value that it rounds (stochastic arithmetic:
Vignes, "Discrete stochastic arithmetic for validating numerical software", 2004). Rows that this moves as much are
noise. A fault moves rows that it does not.

A row is the last dim of a tensor: the features of a token, of a branch or of a head. A wrong expert for one token
is a wrong row, which an error over the whole tensor would hide.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile._torch_private import float32_matmul_precision
from moeca_compile.ops.aten import CASTS, VIEWS

aten = torch.ops.aten

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""The relative error of a row that passes without a look at the noise. In other dtypes: a few roundings."""
_ROUNDINGS = 4
"""In dtypes of 16 bits, this many units of rounding pass without a look at the noise."""
_AMPLITUDE = 1.5
"""The noise that is added to each rounded value, in units of rounding: somewhat more than rounding itself."""
_TRIALS = (3, 24)
"""The fewest trials with noise, and the most: they go on while rows are unexplained. A token between two experts goes
to the other one in some of them."""
_STRAYED = 3.0
"""Of thousands of tokens, one lies where rounding seldom takes it: each trial moves rows that no other trial does. So
many times as many rows may differ. Or as many as some trial moved alone, since a token's heads stray together."""
_UNSTABLE = 0.25
"""If noise moves half of the rows by this much, a fault could not be told from it."""
_MANY = 64
"""Tensors with fewer rows (counters, the chosen tokens of each sample) say nothing about the noise of most values."""
_CHUNK = 1 << 17
"""So many elements are compared at a time, since errors are computed in float64."""

_MOVES = VIEWS | {
    aten.cat.default,
    aten.stack.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.embedding.default,
    aten.where.self,
    aten.scatter.src,
    aten.constant_pad_nd.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.masked_fill.Scalar,
    aten.topk.default,
    aten.sort.default,
    aten.sort.stable,
    aten.amax.default,
    aten.relu.default,
}
"""Ops whose results are among the values of their arguments: they round nothing."""


_NEVER_ZERO = {aten.softmax.int, aten._softmax.default, aten.sigmoid.default, aten.exp.default}
"""Ops whose zeros are rounded: the value was too small for its dtype. In float16, where that is 6e-8, many scores of
a softmax are equal by that, and a selection takes the first of them, but others if they are not rounded."""


class ValidationError(RuntimeError):
    """A rewritten or compiled step differs from the original by more than rounding."""


Trial = Callable[[torch.Generator], Sequence[Any]]
"""The values under comparison, computed with noise from a generator."""


@dataclass(frozen=True)
class Comparison:
    """Two lists of values that agree up to rounding.

    Attributes:
        error: the largest relative error of a row.
        noise: the error that noise commonly causes in a row (the largest median of a tensor's rows); 0 where it was
            not measured.
    """

    error: float = 0.0
    noise: float = 0.0

    @property
    def unstable(self) -> bool:
        """Whether the noise is so large that a fault could hide in it."""
        return self.noise > _UNSTABLE


def allowed_error(dtypes: Iterable[torch.dtype], device: torch.device) -> float:
    """The relative error of a row that passes at once, where values were computed in these dtypes."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max((TOLERANCE.get(d, 0.0) or _ROUNDINGS * unit(d, device) for d in floating), default=0.0)


def unit(dtype: torch.dtype, device: torch.device) -> float:
    """The unit of rounding: half the distance from 1 to the next number.

    On a GPU, products of float32 may be taken in TF32, which has 10 bits.
    """
    tf32 = dtype is torch.float32 and device.type == "cuda" and float32_matmul_precision() != "highest"
    return 2.0**-11 if tf32 else torch.finfo(dtype).eps / 2


def compare(
    found: Sequence[Any], wanted: Sequence[Any], allowed: float, trial: Trial | None = None, spared: float = 0.0
) -> Comparison:
    """Compare values row by row.

    Args:
        found, wanted: values in the same order; what is no tensor is skipped.
        allowed: the relative error of a row that passes at once.
        trial: computes `wanted` with noise; None if `allowed` is the last word.
        spared: the share of a tensor's rows that may differ in any case.

    Raises ValidationError where rows differ that noise does not move.
    """
    pairs = [(one, other) for one, other in zip(found, wanted, strict=True) if isinstance(other, Tensor)]
    errors = [row_errors(one, other) for one, other in pairs]
    worst = max((float(error.max()) for error in errors if error.numel()), default=0.0)
    if all(int((error > allowed).sum()) <= spared * len(error) for error in errors):
        return Comparison(worst)
    if trial is None:
        raise ValidationError(f"error {worst:.2e} exceeds {allowed:.0e}")
    compared = [_Rows(error, allowed) for error in errors]
    for seed in range(_TRIALS[1]):
        moved = _moved([other for _, other in pairs], trial, seed)
        for rows, noise in zip(compared, moved, strict=True):
            rows.note(noise)
        if seed + 1 >= _TRIALS[0] and not any(rows.unexplained.any() for rows in compared):
            break
    for rows in compared:
        rows.check()
    return Comparison(worst, max((rows.common for rows in compared if len(rows.error) >= _MANY), default=0.0))


class _Rows:
    """The rows of one tensor: their errors, and what noise does to them.

    Args:
        error: (rows,) the relative error of each.
        allowed: the error that passes in any case.
    """

    def __init__(self, error: Tensor, allowed: float) -> None:
        self.error, self.allowed, self.trials = error, allowed, 0
        self.most, self.second = torch.zeros_like(error), torch.zeros_like(error)
        """How far any trial moved each row, and any other trial."""
        self.farthest = torch.zeros_like(error, dtype=torch.long)
        """Which trial moved each row the most."""

    def note(self, moved: Tensor) -> None:
        """What one trial's noise did."""
        self.second = torch.maximum(self.second, torch.minimum(self.most, moved))
        self.farthest = torch.where(moved > self.most, self.trials, self.farthest)
        self.most, self.trials = torch.maximum(self.most, moved), self.trials + 1

    @property
    def common(self) -> float:
        """What noise commonly does to a row."""
        return float(self.most.median()) if len(self.most) else 0.0

    @property
    def limit(self) -> float:
        return max(self.allowed, 1.5 * self.common)

    @property
    def unexplained(self) -> Tensor:
        """(rows,) whether a row differs by more than noise commonly does, and than twice what it does to this one."""
        return (self.error > self.limit) & (self.error > 2 * self.most)

    @property
    def strayed(self) -> Tensor:
        """(trials,) how many rows each trial moves that would be unexplained by the others."""
        alone = (self.most > self.limit) & (self.most > 2 * self.second)
        return self.farthest[alone].bincount(minlength=self.trials)

    def check(self) -> None:
        """Raise ValidationError where more rows are unexplained than single trials stray."""
        wrong, strayed = self.unexplained, self.strayed
        if int(wrong.sum()) > max(math.ceil(_STRAYED * float(strayed.double().mean())), int(strayed.max())):
            raise ValidationError(
                f"error {float(self.error[wrong].max()):.2e} exceeds {self.limit:.0e} in {int(wrong.sum())} of "
                f"{len(wrong)} rows"
            )


def _moved(wanted: Sequence[Tensor], trial: Trial, seed: int) -> list[Tensor]:
    """How far one trial's noise moves each row."""
    generator = torch.Generator(wanted[0].device).manual_seed(seed)
    noisy = [value for value in trial(generator) if isinstance(value, Tensor)]
    return [row_errors(one, other) for one, other in zip(noisy, wanted, strict=True)]


def row_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """The relative error of each row (the last dim): (rows,) float64 on the CPU.

    The root mean square of the difference, over that of the wanted row or a tenth of that of the whole tensor,
    whichever is larger. A row of integers has error 0 if it is equal, else 1.
    """
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise ValidationError(f"{tuple(found.shape)} {found.dtype} in place of {tuple(wanted.shape)} {wanted.dtype}")
    if not wanted.numel():
        return torch.zeros(0, dtype=torch.float64)
    width = wanted.shape[-1] if wanted.ndim else 1
    rows = zip(*(_chunks(value, width) for value in (found, wanted)), strict=True)
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return torch.cat([(one != other).any(-1).cpu().double() for one, other in rows])
    moved, scale = (torch.cat(parts) for parts in zip(*(_squares(*pair) for pair in rows), strict=True))
    least = 0.01 * scale.mean()
    error = (moved / scale.maximum(least).clamp_min(1e-60)).sqrt().cpu()
    return error.nan_to_num(nan=float("inf"), posinf=float("inf"))


def _chunks(value: Tensor, width: int) -> Iterable[Tensor]:
    return value.detach().reshape(-1, width).split(max(1, _CHUNK // width))


def _squares(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares of the difference and of the wanted values, by row. Equal infinities and NaNs do not differ."""
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    kind = torch.complex128 if wanted.is_complex() else torch.float64
    difference = torch.where(same, 0, found.to(kind) - wanted.to(kind))
    return difference.abs().square().mean(-1), wanted.to(kind).nan_to_num(0, 0, 0).abs().square().mean(-1)


def with_noise(
    node: fx.Node,
    value: Any,
    arguments: Sequence[Any],
    generator: torch.Generator,
    least: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Any:
    """A node's value with noise, if the node rounds it. A value on another device than the generator stays exact.

    Args:
        node: a node of an ATen graph; value: its value.
        arguments: the values of its input nodes.
        generator: of the noise.
        least: the unit of rounding of a cache that the value goes through, 0 where it goes through none.
        dtype: what the value would be rounded to; None for its own dtype.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.device != generator.device:
        return value
    dtype = dtype or value.dtype
    own = unit(dtype, value.device) if _rounds(node, value, arguments) else 0.0
    if not max(own, least):
        return value
    # Below the least normal number, numbers come no closer to each other.
    size = value.abs().clamp_min(torch.finfo(dtype).tiny)
    if node.target not in _NEVER_ZERO:
        size = size.where(value != 0, 0)
    return (value + _noise_like(value, generator).mul_(_AMPLITUDE * max(own, least)).mul_(size)).to(value.dtype)


def _noise_like(value: Tensor, generator: torch.Generator) -> Tensor:
    """Noise between -1 and 1 for each element; in half of all cases part of it is the same for all elements.

    Rounding can be one-sided. Of values just above a threshold, a comparison takes none that were rounded to it, and
    all that were not rounded. So a count over many tokens changes by more than independent noise ever changes it, and
    with the count where each token's branches are cached.
    """
    wide = torch.promote_types(value.dtype, torch.float32)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=wide, device=value.device, generator=generator).mul_(2).sub_(1)

    drawn = random(1)
    common = drawn.sign() * (2 * drawn.abs() - 1).clamp_min(0)
    return random(*value.shape).mul_(1 - common.abs()).add_(common)


def _rounds(node: fx.Node, value: Tensor, arguments: Sequence[Any]) -> bool:
    source = node.all_input_nodes[0] if node.target is operator.getitem else node
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if source.target in _MOVES or not (tensors or source is not node):
        return False
    if node.target in CASTS:
        return tensors[0].dtype.itemsize > value.dtype.itemsize
    memory = value.untyped_storage().data_ptr()
    return all(tensor.untyped_storage().data_ptr() != memory for tensor in tensors)
