"""A small convolutional classifier that rates samples. Its features are used for the Frechet distance."""

import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 32
LARGEST = 7
"""Convolutions halve the image until its side is at most this."""


class Classifier(nn.Module):
    """Images [B, C, S, S] in [-1, 1] -> logits [B, 10]."""

    def __init__(self, side: int = 8, channels: int = 1, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)
        left, self.further = side // 2, []
        while left > LARGEST:
            left, name = left // 2, f"conv{len(self.further) + 3}"
            self.add_module(name, nn.Conv2d(2 * width, 2 * width, 3, padding=1, stride=2))
            self.further.append(name)
        self.hidden = nn.Linear(2 * width * left**2, FEATURES)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """The penultimate activations, [B, 32]."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        for name in self.further:
            x = F.relu(self.get_submodule(name)(x))
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x)))
