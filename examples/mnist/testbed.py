"""The mnist testbed: its sizes, and how it is trained."""

from dataclasses import dataclass
from pathlib import Path

import torch

from examples.mnist.data import SIDE, load_split, moved
from examples.testbed.model import Config
from examples.testbed.testbed import Testbed
from examples.testbed.training import Plan


@dataclass(frozen=True)
class MnistConfig(Config):
    """28x28 pixels in patches of 4x4; blocks 1, 3, 5 and 7 hold 48 experts, of which a token uses 5."""

    image_size: int = SIDE
    width: int = 96
    depth: int = 8
    heads: int = 3
    experts: int = 48
    experts_per_token: int = 5
    expert_width: int = 48
    patch: int = 4


MNIST = Testbed(
    name="mnist",
    folder=Path(__file__).resolve().parent,
    config=MnistConfig(),
    load_split=load_split,
    plan=Plan(steps=3250, batch=64, lr=1e-3, schedule="hold", half=False),
    classifier_plan=Plan(steps=1500, batch=128, lr=2e-3, schedule="cosine", half=False),
    augmented=moved,
    stored=torch.float16,  # a file of half the size
)
load_model, load_classifier, sample = MNIST.load_model, MNIST.load_classifier, MNIST.sample
