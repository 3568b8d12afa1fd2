"""Labelled images, and how they are divided."""

from typing import NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

HELD_OUT_SHARE = 0.2


class Digits(NamedTuple):
    """images [N, 1, H, W] in [-1, 1], labels [N] in 0..9 (int64)."""

    images: Tensor
    labels: Tensor


def split(images: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[Digits, Digits]:
    """The training and the held-out digits, with the same share of each class in both.

    Args:
        images: [N, 1, H, W], float32 in [-1, 1].
        labels: [N], int64.
    """
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT_SHARE, random_state=seed, stratify=labels
    )

    def part(rows: np.ndarray) -> Digits:
        return Digits(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]))

    return part(train), part(held_out)


def of_classes(data: Digits, labels: Tensor) -> Tensor:
    """Different images [B, 1, H, W] of the classes ``labels`` [B].

    Raises ValueError if a class has too few.
    """
    queues = {label: (data.labels == label).nonzero()[:, 0].tolist() for label in labels.unique().tolist()}
    for label, count in zip(*labels.unique(return_counts=True), strict=True):
        if count > len(queues[label.item()]):
            raise ValueError(f"{count} digits of class {label} were requested, there are {len(queues[label.item()])}")
    return data.images[[queues[label].pop(0) for label in labels.tolist()]]
