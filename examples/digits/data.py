"""scikit-learn's handwritten digits: 1,797 images of 8x8 pixels with 17 gray levels."""

import numpy as np
from sklearn.datasets import load_digits

from examples.testbed.data import LabeledImages, split

GRAY_LEVELS = 16


def load_split(seed: int = 0) -> tuple[LabeledImages, LabeledImages]:
    """The training and the held-out digits, images [N, 1, 8, 8], with the same share of each class in both."""
    bunch = load_digits()
    images = (bunch.images / (GRAY_LEVELS / 2) - 1).astype(np.float32)[:, None]
    return split(images, bunch.target.astype(np.int64), seed)
