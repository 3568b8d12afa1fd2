"""scikit-learn's handwritten digits: 1,797 real 8x8 images with 17 grey levels, shipped in the package."""

from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

HELD_OUT_SHARE = 0.2
GREY_LEVELS = 16


class Digits(NamedTuple):
    """images [N, 1, 8, 8] in [-1, 1], labels [N] in 0..9 (int64)."""

    images: Tensor
    labels: Tensor


def load_split(seed: int = 0) -> tuple[Digits, Digits]:
    """The training and the held-out digits, split by class with a fixed seed."""
    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    images = (bunch.images / (GREY_LEVELS / 2) - 1).astype(np.float32)[:, None]
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT_SHARE, random_state=seed, stratify=labels
    )

    def part(rows: np.ndarray) -> Digits:
        return Digits(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]))

    return part(train), part(held_out)
