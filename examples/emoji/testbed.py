"""The emoji testbed: its sizes, and how it is trained."""

from pathlib import Path

import torch

from examples.emoji.data import SIDE, load_split, moved
from examples.testbed.model import Config
from examples.testbed.testbed import Testbed
from examples.testbed.training import Plan

SIZES = Config(
    image_size=SIDE,
    channels=3,
    patch=4,
    width=96,
    depth=6,
    heads=3,
    moe_every=1,
    router="softmax",
    route_scale=1.0,
    experts=8,
    experts_per_token=2,
    expert_width=40,
    shared_experts=2,
)
"""32x32 RGB pixels in patches of 4x4; every block holds 8 experts, of which a token uses 2, and 2 shared ones."""

EMOJI = Testbed(
    name="emoji",
    folder=Path(__file__).resolve().parent,
    config=SIZES,
    load_split=load_split,
    plan=Plan(steps=5000, batch=64, lr=1e-3, schedule="hold", half=False),
    classifier_plan=Plan(steps=800, batch=128, lr=2e-3, schedule="cosine", half=False),
    augmented=moved,
    guidance=3.0,
    stored=torch.float16,  # a file of half the size
)
load_model, load_classifier, sample = EMOJI.load_model, EMOJI.load_classifier, EMOJI.sample
