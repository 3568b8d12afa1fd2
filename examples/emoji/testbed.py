"""The emoji testbed: its sizes, and how it is trained."""

from dataclasses import dataclass
from pathlib import Path

import torch

from examples.emoji.data import SIDE, load_split, moved
from examples.testbed.model import Config
from examples.testbed.testbed import Testbed
from examples.testbed.training import Plan


@dataclass(frozen=True)
class EmojiConfig(Config):
    """32x32 RGB pixels in patches of 4x4; every block holds 8 experts, of which a token uses 2, and 2 shared ones."""

    image_size: int = SIDE
    width: int = 96
    depth: int = 6
    heads: int = 3
    experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 40
    patch: int = 4
    channels: int = 3
    moe_every: int = 1
    route_scale: float = 1.0
    router: str = "softmax"
    shared_experts: int = 2


EMOJI = Testbed(
    name="emoji",
    folder=Path(__file__).resolve().parent,
    config=EmojiConfig(),
    load_split=load_split,
    plan=Plan(steps=5000, batch=64, lr=1e-3, schedule="hold", half=False),
    classifier_plan=Plan(steps=1500, batch=128, lr=2e-3, schedule="cosine", half=False),
    augmented=moved,
    stored=torch.float16,  # a file of half the size
)
load_model, load_classifier, sample = EMOJI.load_model, EMOJI.load_classifier, EMOJI.sample
