"""Labelled images, and how they are divided."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor

HELD_OUT_SHARE = 0.2


class LabeledImages(NamedTuple):
    """images [N, C, H, W] in [-1, 1], labels [N] in 0..9 (int64)."""

    images: Tensor
    labels: Tensor


def split(images: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[LabeledImages, LabeledImages]:
    """The training and the held-out images, with the same share of each class in both.

    Args:
        images: [N, C, H, W], float32 in [-1, 1].
        labels: [N], int64.
    """
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT_SHARE, random_state=seed, stratify=labels
    )

    def part(rows: np.ndarray) -> LabeledImages:
        return LabeledImages(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]))

    return part(train), part(held_out)


def of_classes(data: LabeledImages, labels: Tensor) -> Tensor:
    """Different images [B, C, H, W] of the classes ``labels`` [B].

    Raises ValueError if a class has too few.
    """
    queues = {label: (data.labels == label).nonzero()[:, 0].tolist() for label in labels.unique().tolist()}
    for label, count in zip(*labels.unique(return_counts=True), strict=True):
        if count > len(queues[label.item()]):
            raise ValueError(f"{count} images of class {label} were requested, there are {len(queues[label.item()])}")
    return data.images[[queues[label].pop(0) for label in labels.tolist()]]


def shifted(images: Tensor, by: int, fill: float) -> Tensor:
    """Each of the images [B, C, H, W] moved by up to ``by`` pixels in both directions at random; ``fill`` is new."""
    batch, channels, height, width = images.shape
    padded = F.pad(images, (by,) * 4, value=fill)
    down, right = torch.randint(2 * by + 1, (2, batch, 1))
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    image, channel = torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
