"""PSNR and SSIM against known values."""

from __future__ import annotations

import builtins
import math

import pytest
import torch

from moeca_compile.tuning.quality import psnr_of_each, ssim


def test_psnr_of_each_picture():
    reference = torch.zeros(3, 1, 2, 2)
    outputs = reference.clone()
    outputs[1] += 0.1
    outputs[2, 0, 0, 0] = 0.2
    found = psnr_of_each(outputs, reference, 2.0)
    assert found == pytest.approx([150.0, 20 * math.log10(2 / 0.1), 10 * math.log10(4 / 0.01)])


def test_values_that_are_not_finite_are_worse_than_any():
    assert psnr_of_each(torch.full((1, 2), math.nan), torch.zeros(1, 2), 1.0) == [-150.0]


def test_ssim_is_that_of_scikit_image_and_none_where_it_does_not_apply(monkeypatch):
    skimage = pytest.importorskip("skimage.metrics")
    pictures = torch.rand(2, 3, 9, 9)
    noisy = pictures + 0.1 * torch.randn(2, 3, 9, 9)
    by_hand = [
        skimage.structural_similarity(a.numpy(), b.numpy(), data_range=1.0, channel_axis=0)
        for a, b in zip(noisy, pictures, strict=True)
    ]
    assert ssim([noisy], [pictures], 1.0) == pytest.approx(sum(by_hand) / 2)
    assert ssim([pictures], [pictures], 1.0) == pytest.approx(1.0)
    assert ssim([pictures[:, 0]], [pictures[:, 0]], 1.0) is None
    assert ssim([pictures[..., :6]], [pictures[..., :6]], 1.0) is None
    known = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("skimage"):
            raise ImportError(name)
        return known(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert ssim([pictures], [pictures], 1.0) is None
