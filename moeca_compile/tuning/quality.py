"""How near outputs are to the uncached ones from the same seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

BEST = 150.0
"""The PSNR of equal outputs in dB, since JSON has no infinity."""
REPEATABLE = 30.0
"""dB between two runs of one seed: kernels may sum in another order, and chaotic pictures make much of it."""
_WINDOW = 7
"""The side of the window that structural similarity looks at, as in scikit-image."""


def psnr_of_each(outputs: Tensor, reference: Tensor, data_range: float) -> list[float]:
    """Peak signal-to-noise ratio in dB of each item of the first dimension, at most 150.

    `moeca bench` shows the dB of the error over all items at once, which is no more than the mean of these.

    Args:
        outputs, reference: [B, ...].
        data_range: the largest minus the smallest value that there can be.
    """
    found: list[float] = []
    for output, wanted in zip(outputs.double(), reference.double(), strict=True):
        error = float((output - wanted).square().mean())
        worst = BEST if error == 0 else 10 * math.log10(data_range**2 / error)
        found.append(min(BEST, worst) if math.isfinite(error) else -BEST)
    return found


def ssim(outputs: Sequence[Tensor], references: Sequence[Tensor], data_range: float) -> float | None:
    """Mean structural similarity of batches [B, C, H, W] by scikit-image; None without it, and for other shapes."""
    if any(batch.ndim != 4 or min(batch.shape[2:]) < _WINDOW for batch in references):
        return None
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    pairs = zip(torch.cat([*outputs]).float().numpy(), torch.cat([*references]).float().numpy(), strict=True)
    return fmean(float(structural_similarity(a, b, data_range=data_range, channel_axis=0)) for a, b in pairs)
