import pytest
import torch

from examples.digits.testbed import DIGITS
from examples.emoji.testbed import EMOJI
from examples.mnist.testbed import MNIST
from examples.testbed.data import of_classes, shifted


@pytest.mark.parametrize(("testbed", "images", "again"), [(DIGITS, 1797, 0), (MNIST, 5000, 0), (EMOJI, 1373, 3)])
def test_split_is_disjoint_complete_and_stratified(testbed, images, again):
    """``again`` images were held out that are among those of training, too; they are left out."""
    train, held_out = testbed.load_split()
    assert len(train.labels) + len(held_out.labels) + again == images
    assert len(held_out.labels) + again == -(-images // 5)
    share = held_out.labels.bincount() / (train.labels.bincount() + held_out.labels.bincount())
    assert torch.allclose(share, torch.full((10,), 0.2), atol=0.01)
    rows = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in rows for image in held_out.images)


@pytest.mark.parametrize(("testbed", "levels"), [(DIGITS, 17), (MNIST, 256), (EMOJI, 256)])
def test_images_are_scaled_to_minus_one_and_one(testbed, levels):
    for part in testbed.load_split():
        assert part.images.shape[1:] == testbed.image_shape
        assert part.images.dtype == torch.float32 and part.labels.dtype == torch.int64
        assert (part.images.min().item(), part.images.max().item()) == (-1.0, 1.0)
        found = (part.images + 1) * (levels - 1) / 2
        torch.testing.assert_close(found, found.round(), rtol=0, atol=1e-4)


def test_split_is_the_same_every_time():
    assert torch.equal(DIGITS.load_split()[0].images, DIGITS.load_split()[0].images)
    assert not torch.equal(DIGITS.load_split(seed=1)[0].labels, DIGITS.load_split()[0].labels)


def test_of_classes_gives_different_digits_of_each_class():
    train, _ = DIGITS.load_split()
    labels = torch.tensor([3, 1, 3, 0])
    images = of_classes(train, labels)
    for image, label in zip(images, labels, strict=True):
        same = (train.images == image).flatten(1).all(dim=1)
        assert (train.labels[same] == label).all()
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize(("channels", "by", "fill"), [(1, 2, -1.0), (3, 1, 0.5)])
def test_shifted_images_are_each_moved_by_their_own_offset(channels, by, fill):
    torch.manual_seed(0)
    images = torch.full((200, channels, 9, 11), fill)
    images[:, :, 4, 5] = 1 + torch.arange(channels)  # a color of its own
    moved = shifted(images, by, fill)
    assert moved.shape == images.shape and torch.equal(moved.sum((2, 3)), images.sum((2, 3)))
    _, channel, rows, columns = (moved >= 1).nonzero(as_tuple=True)
    found = set(zip(channel.tolist(), (rows - 4).tolist(), (columns - 5).tolist(), strict=True))
    offsets = range(-by, by + 1)
    assert found == {(c, down, right) for c in range(channels) for down in offsets for right in offsets}
    images[:, :, 0] = 1.0
    assert (shifted(images, by, fill)[:, 0, 1:] == 1.0).flatten(1).any(1).any(), "rows move down, and fill comes in"
