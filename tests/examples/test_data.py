import torch

from examples.digits.data import load_split, of_classes


def test_split_is_disjoint_complete_and_stratified():
    train, held_out = load_split()
    assert len(train.labels) + len(held_out.labels) == 1797
    assert len(held_out.labels) == 360
    share = held_out.labels.bincount() / (train.labels.bincount() + held_out.labels.bincount())
    assert torch.allclose(share, torch.full((10,), 0.2), atol=0.01)
    rows = {tuple(image.flatten().tolist()) for image in train.images}
    assert not any(tuple(image.flatten().tolist()) in rows for image in held_out.images)


def test_images_are_scaled_to_minus_one_and_one():
    train, held_out = load_split()
    for part in (train, held_out):
        assert part.images.shape[1:] == (1, 8, 8)
        assert part.images.dtype == torch.float32
        assert (part.images.min().item(), part.images.max().item()) == (-1.0, 1.0)
    assert torch.equal(train.images * 8, (train.images * 8).round())  # 17 grey levels


def test_split_is_the_same_every_time():
    assert torch.equal(load_split()[0].images, load_split()[0].images)
    assert not torch.equal(load_split(seed=1)[0].labels, load_split()[0].labels)


def test_of_classes_gives_different_digits_of_each_class():
    train, _ = load_split()
    labels = torch.tensor([3, 1, 3, 0])
    images = of_classes(train, labels)
    for image, label in zip(images, labels, strict=True):
        same = (train.images == image).flatten(1).all(dim=1)
        assert (train.labels[same] == label).all()
    assert not torch.equal(images[0], images[2])
