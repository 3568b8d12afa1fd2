"""How near cached results are to the uncached ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW = 7
"""Pixels of the side of the window over which scikit-image compares structures, by default."""
NO_SCIKIT_IMAGE = "SSIM is left out: scikit-image is not installed"
NO_PICTURES = "SSIM is left out: the results, {0}, are no pictures (batch, 1 or 3, height, width)"
TOO_SMALL = f"SSIM is left out: the pictures, {{0}}, are smaller than its window of {WINDOW} pixels"
NO_LPIPS = "LPIPS is left out: {0}"
OTHER_SHAPE = "the results have other shapes than those of eager, so nothing is compared"
NOT_FINITE = "some values are not finite, so nothing is compared"


@dataclass(frozen=True)
class Likeness:
    """How near results are to those wanted.

    Attributes:
        equal: all values are the same.
        psnr: peak signal-to-noise ratio in dB of the mean squared error over all values, where the peak is the range
            of the wanted values (for integers, of their dtype). The tuner's is the mean of the dB of each picture,
            which is no lower at the same peak. None where they are equal, not finite, or of other shapes.
        ssim: structural similarity (Wang et al. 2004), the mean over pictures. None where that cannot be had.
        lpips: learned perceptual distance (Zhang et al. 2018, AlexNet), the mean over pictures. Likewise.
        remarks: why something is None.
    """

    equal: bool
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    remarks: tuple[str, ...] = ()


def pictures(result: Tensor) -> Tensor | None:
    """The pictures (batch, channels, height, width) of a result, whose channels may be last; None if it has none."""
    if result.ndim == 4 and result.shape[1] in (1, 3):
        return result
    return result.permute(0, 3, 1, 2) if result.ndim == 4 and result.shape[3] in (1, 3) else None


def value_range(results: Sequence[Tensor]) -> tuple[float, float]:
    """The lowest and highest value; for integers those that their dtype can hold."""
    dtype = results[0].dtype
    if not dtype.is_floating_point:
        return float(torch.iinfo(dtype).min), float(torch.iinfo(dtype).max)
    return min(float(each.min()) for each in results), max(float(each.max()) for each in results)


def likeness(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Likeness:
    """Compare results, one a seed, with those wanted."""
    if all(map(torch.equal, found, wanted)):
        return Likeness(equal=True)
    if any(a.shape != b.shape for a, b in zip(found, wanted, strict=True)):
        return Likeness(equal=False, remarks=(OTHER_SHAPE,))
    if not all(bool(each.isfinite().all()) for each in (*found, *wanted)):
        return Likeness(equal=False, remarks=(NOT_FINITE,))
    low, high = value_range(wanted)
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True)]
    ssim, without_ssim = _ssim(pairs, high - low)
    lpips, without_lpips = _lpips(pairs, low, high)
    remarks = tuple(filter(None, [without_ssim, without_lpips]))
    return Likeness(False, _psnr(pairs, high - low), ssim, lpips, remarks)


def _psnr(pairs: Sequence[tuple[Tensor, Tensor]], peak: float) -> float | None:
    error = sum(float((a - b).square().sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    return 10 * math.log10(peak**2 / error) if peak else None


def _ssim(pairs: Sequence[tuple[Tensor, Tensor]], peak: float) -> tuple[float | None, str]:
    """The figure, or why there is none."""
    shape = tuple(pairs[0][0].shape)
    shown = [(pictures(a), pictures(b)) for a, b in pairs]
    if shown[0][0] is None:
        return None, NO_PICTURES.format(shape)
    if min(shown[0][0].shape[-2:]) < WINDOW:
        return None, TOO_SMALL.format(shape)
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None, NO_SCIKIT_IMAGE
    each = [
        float(structural_similarity(x.numpy(), y.numpy(), data_range=peak, channel_axis=0))
        for a, b in shown
        if a is not None and b is not None
        for x, y in zip(a, b, strict=True)
    ]
    return sum(each) / len(each), ""


def _lpips(pairs: Sequence[tuple[Tensor, Tensor]], low: float, high: float) -> tuple[float | None, str]:
    """The figure, or why there is none; no reason where the package is not installed."""
    try:
        from lpips import LPIPS
    except ImportError:
        return None, ""
    try:
        distance = LPIPS(net="alex", verbose=False).eval()
        each = [distance(*(_in_colors(side, low, high) for side in pair)).flatten() for pair in pairs]
    except Exception as error:  # pictures too small for the network, or weights that cannot be downloaded
        return None, NO_LPIPS.format(error)
    return float(torch.cat(each).mean()), ""


def _in_colors(result: Tensor, low: float, high: float) -> Tensor:
    """Pictures of three channels in [-1, 1], as LPIPS takes them. Raises ValueError for what is none."""
    shown = pictures(result)
    if shown is None:
        raise ValueError(f"the results, {tuple(result.shape)}, are no pictures")
    scaled = (shown.float() - low) / (high - low) * 2 - 1
    return scaled.expand(-1, 3, -1, -1)
