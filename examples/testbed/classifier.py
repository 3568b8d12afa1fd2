"""A small convolutional classifier that rates samples. Its features are used for the Frechet distance."""

import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 32
SMALLEST = 8
"""Images longer than this are halved once more before the last layers."""


class DigitsClassifier(nn.Module):
    """Images [B, 1, S, S] in [-1, 1] -> logits [B, 10]."""

    def __init__(self, side: int = 8, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, stride=2) if side > SMALLEST else None
        left = side // 4 if self.conv3 else side // 2
        self.hidden = nn.Linear(2 * width * left**2, FEATURES)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """The penultimate activations, [B, 32]."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        if self.conv3 is not None:
            x = F.relu(self.conv3(x))
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x)))
