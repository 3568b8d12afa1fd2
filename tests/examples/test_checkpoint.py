import pytest
import torch

from examples.digits.checkpoint import (
    CLASSIFIER_PATH,
    MODEL_PATH,
    CheckpointError,
    load_classifier,
    load_model,
    save_model,
    save_weights,
)
from examples.digits.classifier import DigitsClassifier
from examples.digits.data import load_split
from examples.digits.metrics import agreement, expert_load
from examples.digits.model import DigitsConfig, DigitsDiT
from examples.digits.sampling import generate

SMALL = DigitsConfig(width=32, depth=2, heads=2, expert_width=16)


def test_a_saved_model_comes_back_with_its_sizes(tmp_path):
    model = DigitsDiT(SMALL)
    save_model(model, tmp_path / "new" / "model.safetensors")
    again = load_model(tmp_path / "new" / "model.safetensors")
    assert again.cfg == SMALL
    assert not again.training
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("load", [load_model, load_classifier])
def test_missing_checkpoint_says_which_and_how_to_make_it(load, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*gone\.safetensors; python .*train\.py"):
        load(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("load", [load_model, load_classifier])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", None], ids=["empty", "noise", "cut"])
def test_damaged_checkpoint_says_so(load, content, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(DigitsDiT(SMALL), path)
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged .*train\.py"):
        load(path)


def test_checkpoint_of_something_else_says_so(tmp_path):
    path = tmp_path / "other.safetensors"
    save_weights(DigitsClassifier(), path)
    with pytest.raises(CheckpointError, match="has no configuration of this model"):
        load_model(path)
    save_weights(DigitsClassifier(), path, config={"width": 32})
    with pytest.raises(CheckpointError, match="holds another model's weights"):
        load_model(path)
    save_weights(DigitsClassifier(), path, config={"patch": 2})
    with pytest.raises(CheckpointError, match="patch"):
        load_model(path)


def test_the_shipped_checkpoints_are_small():
    assert MODEL_PATH.stat().st_size + CLASSIFIER_PATH.stat().st_size < 16e6


def test_the_shipped_classifier_knows_held_out_digits():
    held_out = load_split()[1]
    assert agreement(load_classifier(), held_out.images, held_out.labels) > 0.97


def test_the_shipped_model_draws_the_requested_digits_with_all_its_experts():
    model, labels = load_model(), torch.arange(40) % 10
    with expert_load(model) as load:
        images = generate(model, labels, steps=10)
    assert agreement(load_classifier(), images, labels) >= 0.9
    assert set(load()) == {"blocks.1.mlp.gate", "blocks.3.mlp.gate", "blocks.5.mlp.gate"}
    assert all(shares.min() > 0.02 for shares in load().values())
