"""The digits testbed: its sizes, and how it is trained."""

from dataclasses import dataclass
from pathlib import Path

from examples.digits.data import load_split
from examples.testbed.model import Config
from examples.testbed.testbed import Testbed
from examples.testbed.training import Plan


@dataclass(frozen=True)
class DigitsConfig(Config):
    """8x8 pixels, each of which is a token; blocks 1, 3 and 5 hold 8 experts, of which a token uses 2."""

    image_size: int = 8
    width: int = 128
    depth: int = 6
    heads: int = 4
    experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 192


DIGITS = Testbed(
    name="digits",
    folder=Path(__file__).resolve().parent,
    config=DigitsConfig(),
    load_split=load_split,
    plan=Plan(steps=6500, batch=32, lr=1e-3, schedule="cosine", half=True),
    classifier_plan=Plan(steps=1500, batch=128, lr=2e-3, schedule="cosine", half=False),
)
load_model, load_classifier, sample = DIGITS.load_model, DIGITS.load_classifier, DIGITS.sample
