"""scikit-learn's handwritten digits: 1,797 images of 8x8 pixels with 17 gray levels."""

from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

HELD_OUT_SHARE = 0.2
GRAY_LEVELS = 16


class Digits(NamedTuple):
    """images [N, 1, 8, 8] in [-1, 1], labels [N] in 0..9 (int64)."""

    images: Tensor
    labels: Tensor


def of_classes(data: Digits, labels: Tensor) -> Tensor:
    """Different images [B, 1, 8, 8] of the classes ``labels`` [B].

    Raises ValueError if a class has too few.
    """
    queues = {label: (data.labels == label).nonzero()[:, 0].tolist() for label in labels.unique().tolist()}
    for label, count in zip(*labels.unique(return_counts=True), strict=True):
        if count > len(queues[label.item()]):
            raise ValueError(f"{count} digits of class {label} were requested, there are {len(queues[label.item()])}")
    return data.images[[queues[label].pop(0) for label in labels.tolist()]]


def load_split(seed: int = 0) -> tuple[Digits, Digits]:
    """The training and the held-out digits, with the same share of each class in both."""
    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    images = (bunch.images / (GRAY_LEVELS / 2) - 1).astype(np.float32)[:, None]
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT_SHARE, random_state=seed, stratify=labels
    )

    def part(rows: np.ndarray) -> Digits:
        return Digits(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]))

    return part(train), part(held_out)
