"""How near results are, held against known values."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from skimage.metrics import structural_similarity

from moeca_compile.command.likeness import likeness, pictures


def test_a_constant_error_has_the_psnr_of_its_size():
    wanted = [torch.tensor([[-1.0, 0.0], [0.5, 3.0]]), torch.zeros(2, 2)]  # a range of 4
    found = likeness([each + 0.4 for each in wanted], wanted)
    assert found.psnr == pytest.approx(20) and not found.equal
    assert found.ssim is None and "are no pictures" in found.remarks[0]


def test_integers_have_the_range_of_their_dtype():
    wanted = [torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)]
    found = likeness([wanted[0] + 5], wanted)
    assert found.psnr == pytest.approx(20 * math.log10(255 / 5))


def test_equal_results_are_said_to_be_equal():
    assert likeness([torch.ones(3)], [torch.ones(3)]).equal


def test_ssim_is_the_mean_over_all_pictures_whose_channels_may_be_last():
    torch.manual_seed(1)
    wanted = [torch.rand(2, 3, 9, 12) for _ in range(2)]
    found = [each + 0.1 * torch.rand_like(each) for each in wanted]
    peak = float(torch.stack(wanted).max() - torch.stack(wanted).min())
    each = [
        structural_similarity(a.numpy(), b.numpy(), data_range=peak, channel_axis=0)
        for a, b in zip(torch.cat(found), torch.cat(wanted), strict=True)
    ]
    assert likeness(found, wanted).ssim == pytest.approx(sum(each) / 4, abs=1e-5)
    last = [[each.permute(0, 2, 3, 1) for each in side] for side in (found, wanted)]
    assert likeness(*last).ssim == pytest.approx(sum(each) / 4, abs=1e-5)


def test_what_are_pictures():
    assert pictures(torch.zeros(2, 1, 8, 8)) is not None and pictures(torch.zeros(2, 8, 9, 3)).shape == (2, 3, 8, 9)
    assert pictures(torch.zeros(2, 4, 8, 8)) is None and pictures(torch.zeros(1, 64, 64)) is None


def test_why_there_is_no_ssim(monkeypatch):
    small = torch.zeros(1, 1, 4, 4)
    found = likeness([small + torch.eye(4)], [small + 2 * torch.eye(4)])
    assert found.psnr is not None and "smaller than its window of 7 pixels" in found.remarks[0]
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    found = likeness([torch.rand(1, 1, 8, 8)], [torch.rand(1, 1, 8, 8)])
    assert found.ssim is None and found.remarks == ("SSIM is left out: scikit-image is not installed",)


def test_values_that_are_not_finite_are_not_compared():
    found = likeness([torch.tensor([1.0, math.nan])], [torch.tensor([1.0, 2.0])])
    assert found.psnr is None and "not finite" in found.remarks[0]


def test_results_of_other_shapes_are_not_compared():
    found = likeness([torch.ones(2, 1)], [torch.zeros(2, 2)])
    assert found.psnr is None and "other shapes" in found.remarks[0]


class MeanDistance(torch.nn.Module):
    """In the place of the network: it takes what the network takes."""

    def __init__(self, net, verbose):
        super().__init__()
        assert net == "alex"

    def forward(self, a, b):
        assert a.shape[1] == b.shape[1] == 3 and float(b.min()) == -1 and float(b.max()) == 1
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


def test_lpips_gets_colors_from_minus_one_to_one_where_it_is_installed(monkeypatch):
    module = ModuleType("lpips")
    module.LPIPS = MeanDistance
    monkeypatch.setitem(sys.modules, "lpips", module)
    wanted = torch.arange(128.0).reshape(2, 1, 8, 8)
    assert likeness([wanted + 12.7], [wanted]).lpips == pytest.approx(0.2, abs=1e-6)
    tokens = likeness([torch.zeros(2, 64)], [torch.ones(2, 64)])
    assert tokens.lpips is None and any(remark.startswith("LPIPS is left out: ") for remark in tokens.remarks)
