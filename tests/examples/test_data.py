import pytest
import torch

from examples.digits.testbed import DIGITS
from examples.mnist.data import SHIFT, shifted
from examples.mnist.testbed import MNIST
from examples.testbed.data import of_classes

of_each_testbed = pytest.mark.parametrize(
    ("testbed", "images", "grays"), [(DIGITS, 1797, 17), (MNIST, 5000, 256)], ids=["digits", "mnist"]
)


@of_each_testbed
def test_split_is_disjoint_complete_and_stratified(testbed, images, grays):
    train, held_out = testbed.load_split()
    assert len(train.labels) + len(held_out.labels) == images
    assert len(held_out.labels) == -(-images // 5)
    share = held_out.labels.bincount() / (train.labels.bincount() + held_out.labels.bincount())
    assert torch.allclose(share, torch.full((10,), 0.2), atol=0.01)
    rows = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in rows for image in held_out.images)


@of_each_testbed
def test_images_are_scaled_to_minus_one_and_one(testbed, images, grays):
    for part in testbed.load_split():
        assert part.images.shape[1:] == testbed.image_shape
        assert part.images.dtype == torch.float32 and part.labels.dtype == torch.int64
        assert (part.images.min().item(), part.images.max().item()) == (-1.0, 1.0)
        levels = (part.images + 1) * (grays - 1) / 2
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


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


def test_shifted_images_are_each_moved_by_their_own_offset():
    torch.manual_seed(0)
    images = torch.full((200, 1, 9, 11), -1.0)
    images[:, 0, 4, 5] = 1.0
    moved = shifted(images)
    assert moved.shape == images.shape and torch.equal(moved.sum((1, 2, 3)), images.sum((1, 2, 3)))
    _, _, rows, columns = (moved == 1.0).nonzero(as_tuple=True)
    found = set(zip((rows - 4).tolist(), (columns - 5).tolist(), strict=True))
    assert found == {(down, right) for down in range(-SHIFT, SHIFT + 1) for right in range(-SHIFT, SHIFT + 1)}
    images[:, 0, 0] = 1.0
    assert (shifted(images)[:, 0, 1:] == 1.0).flatten(1).any(1).any(), "rows move down, and black comes in"
