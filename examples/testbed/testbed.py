"""What a testbed is: a model's sizes, data, a classifier, how both are trained, and where their checkpoints are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.testbed import checkpoint, sampling
from examples.testbed.classifier import Classifier
from examples.testbed.data import LabeledImages
from examples.testbed.model import Config, MoEDiT
from examples.testbed.sampling import VelocityModel
from examples.testbed.training import Plan


def unchanged(images: Tensor) -> Tensor:
    return images


@dataclass(frozen=True)
class Testbed:
    """A model with its data.

    Attributes:
        folder: where the checkpoints and the scripts are.
        config: the model's sizes; its class is that of checkpoints.
        load_split: returns the training and the held-out images.
        plan, classifier_plan: how the two are trained unless the command line says otherwise.
        augmented: changes images [B, C, H, W] of each training batch at random.
        guidance: how much classifier-free guidance samples get unless told otherwise.
        stored: dtype of the shipped checkpoints; None keeps that of training.
    """

    __test__ = False  # not a test of pytest's

    name: str
    folder: Path
    config: Config
    load_split: Callable[[], tuple[LabeledImages, LabeledImages]]
    plan: Plan
    classifier_plan: Plan
    augmented: Callable[[Tensor], Tensor] = field(default=unchanged)
    guidance: float = 1.5
    stored: torch.dtype | None = None

    @property
    def model_path(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of one image: (channels, side, side)."""
        return self.config.channels, self.config.image_size, self.config.image_size

    @property
    def classifier_path(self) -> Path:
        return self.folder / "classifier.safetensors"

    def load_model(self, path: Path | None = None) -> MoEDiT:
        """The trained model in evaluation mode. Raises CheckpointError."""
        path = path or self.model_path
        return checkpoint.load_model(path, type(self.config), self._remedy(f"--out {path}"))

    def load_classifier(self, path: Path | None = None) -> Classifier:
        """The trained classifier in evaluation mode. Raises CheckpointError."""
        path = path or self.classifier_path
        remedy = self._remedy(f"--classifier --out {path}")
        weights, _ = checkpoint.read_weights(path, remedy)
        classifier = Classifier(self.config.image_size, self.config.channels)
        checkpoint.load_into(classifier, weights, path, remedy)
        return classifier.eval().requires_grad_(False)

    def generate(self, model: VelocityModel, labels: Tensor, **options: Any) -> Tensor:
        """Images [B, C, S, S] of the classes ``labels`` [B]; options are those of ``sampling.generate``."""
        return sampling.generate(model, labels, shape=self.image_shape, **{"guidance": self.guidance, **options})

    def sample(self, model: nn.Module, seed: int) -> Tensor:
        """Two of each class, [20, C, S, S], in 50 Euler steps with guidance: for `moeca bench`."""
        labels = torch.arange(20, device=next(model.parameters()).device) % 10
        return self.generate(model, labels, seed=seed)

    def _remedy(self, arguments: str) -> str:
        return f"python {self.folder / 'train.py'} {arguments} makes it"
