import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from examples.digits.testbed import DigitsConfig
from examples.testbed.classifier import Classifier
from examples.testbed.metrics import EXACT_DB, agreement, expert_load, frechet_distance, psnr, ssim
from examples.testbed.model import MoEDiT


class TwoFeatures(Classifier):
    """Features: the first two pixels, as they are."""

    def features(self, x):
        return x.flatten(1)[:, :2]


def test_psnr_by_hand():
    reference = torch.zeros(2, 1, 8, 8)
    assert psnr(reference + 0.02, reference) == pytest.approx(40.0, abs=1e-3)
    assert psnr(reference, reference.clone()) == EXACT_DB


def test_psnr_is_of_what_is_displayed():
    white = torch.ones(1, 1, 8, 8)
    assert psnr(white + 5, white) == EXACT_DB


def test_color_counts_by_channel():
    """An error in one of three channels is a third of one in all, 4.77 dB less."""
    torch.manual_seed(0)
    reference, images = torch.rand(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    images.copy_(reference)[:, 1] += 0.02
    assert psnr(images, reference) == pytest.approx(40 + 4.771, abs=1e-2)
    images[:, 1] = torch.rand(2, 8, 8)
    expected = [
        structural_similarity(a.numpy(), b.numpy(), data_range=2.0, channel_axis=0)
        for a, b in zip(images, reference, strict=True)
    ]
    assert ssim(images, reference) == pytest.approx(np.mean(expected), abs=1e-6) and ssim(images, reference) < 0.9


def test_ssim_of_equal_and_of_unlike_images():
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    assert ssim(images, images.clone()) == pytest.approx(1.0)
    assert ssim(torch.rand(3, 1, 8, 8) * 2 - 1, images) < 0.5


def test_agreement_counts_hits():
    class Fixed(Classifier):
        def forward(self, x):
            return torch.eye(10)[[0, 1, 2, 3]]

    assert agreement(Fixed(), torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 9])) == 0.75


def test_frechet_distance_of_gaussians_has_its_closed_form():
    torch.manual_seed(0)
    points = torch.randn(4000, 2)
    points = (points - points.mean(0)) @ torch.from_numpy(
        np.linalg.inv(np.linalg.cholesky(np.cov(points.numpy(), rowvar=False))).T
    ).float()
    first, second = torch.zeros(4000, 1, 8, 8), torch.zeros(4000, 1, 8, 8)
    first.flatten(1)[:, :2] = points * 0.05  # deviation 0.05
    second.flatten(1)[:, :2] = points * 0.15 + 0.3
    expected = 2 * 0.3**2 + 2 * (0.15 - 0.05) ** 2
    assert frechet_distance(TwoFeatures(), first, second) == pytest.approx(expected, rel=1e-3)


def test_frechet_distance_with_fewer_images_than_features_is_finite():
    images = torch.randn(5, 1, 8, 8)
    assert frechet_distance(Classifier(), images, images) == pytest.approx(0, abs=1e-3)


def test_expert_load_counts_branches_while_open():
    torch.manual_seed(0)
    model = MoEDiT(DigitsConfig(width=32, depth=2, heads=2, expert_width=16)).eval()
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 1])
    with torch.no_grad():
        with expert_load(model) as load:
            model(x, t, y)
        inside = load()["blocks.1.mlp.gate"]
        model(torch.zeros_like(x), t, y)
    assert inside.sum().item() == pytest.approx(1)
    assert torch.equal(load()["blocks.1.mlp.gate"], inside)
