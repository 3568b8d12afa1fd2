"""How far cached samples are from uncached ones, and how good both are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from examples.testbed.classifier import Classifier
from examples.testbed.model import BalancedRouter, MoEDiT

DATA_RANGE = 2.0  # images span [-1, 1]
EXACT_DB = 150.0  # PSNR of equal images, because JSON cannot express infinity


def _displayed(images: Tensor) -> np.ndarray:
    return images.detach().float().cpu().clamp(-1, 1).numpy()


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of the batch [B, C, H, W]; at most 150."""
    shown, wanted = _displayed(images), _displayed(reference)
    if np.array_equal(shown, wanted):
        return EXACT_DB
    return min(EXACT_DB, float(peak_signal_noise_ratio(wanted, shown, data_range=DATA_RANGE)))


def ssim(images: Tensor, reference: Tensor) -> float:
    """Structural similarity, the mean over the images and channels of the batch [B, C, H, W]."""
    planes = (_displayed(each).reshape(-1, *each.shape[2:]) for each in (reference, images))
    return float(np.mean([structural_similarity(a, b, data_range=DATA_RANGE) for a, b in zip(*planes, strict=True)]))


@contextmanager
def expert_load(model: MoEDiT) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Count routed branches inside. Yields a function that returns, for each layer, the share of each expert [E]."""
    counts = {
        name: torch.zeros(model.cfg.experts) for name, m in model.named_modules() if isinstance(m, BalancedRouter)
    }

    def count(name: str, indices: Tensor) -> None:
        counts[name] += indices.flatten().bincount(minlength=model.cfg.experts).cpu()

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: count(name, out[0]))
        for name in counts
    ]
    try:
        yield lambda: {name: total / total.sum() for name, total in counts.items()}
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def agreement(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of images [B, C, H, W] that the classifier assigns to the requested class [B]."""
    predicted = classifier(images.float().cpu().clamp(-1, 1)).argmax(dim=1)
    return (predicted == labels.cpu()).float().mean().item()


@torch.no_grad()
def frechet_distance(classifier: Classifier, images: Tensor, reference: Tensor) -> float:
    """Frechet distance between Gaussians fitted to the classifier's features of both sets [*, C, H, W].

    It is biased upwards for few images, so compare only figures from the same number of images.
    """
    first, second = (classifier.features(x.float().cpu().clamp(-1, 1)).double().numpy() for x in (images, reference))
    covariance_1, covariance_2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # The trace of the product's square root, from its eigenvalues, which are real and >= 0 up to rounding.
    mixed = np.sqrt(np.linalg.eigvals(covariance_1 @ covariance_2).real.clip(min=0)).sum()
    shift = first.mean(axis=0) - second.mean(axis=0)
    return float(shift @ shift + np.trace(covariance_1 + covariance_2) - 2 * mixed)
