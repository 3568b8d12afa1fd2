import pytest
import torch

from examples.digits.testbed import DIGITS, DigitsConfig, load_classifier, load_model
from examples.emoji.testbed import EMOJI
from examples.mnist.testbed import MNIST
from examples.testbed.checkpoint import (
    CheckpointError,
    save_model,
    save_weights,
)
from examples.testbed.classifier import Classifier
from examples.testbed.metrics import agreement, expert_load
from examples.testbed.model import MoEDiT
from examples.testbed.testbed import Testbed

SMALL = DigitsConfig(width=32, depth=2, heads=2, expert_width=16)
TESTBEDS = (DIGITS, MNIST, EMOJI)
KNOWN = {"digits": 0.97, "mnist": 0.97, "emoji": 0.8}
"""The least share of held-out images that the classifier knows: emoji of ten kinds are harder than digits."""
DRAWN = {"digits": 0.9, "mnist": 0.9, "emoji": 0.5}
"""The least share of samples that it takes for the requested class."""


def test_a_saved_model_comes_back_with_its_sizes(tmp_path):
    model = MoEDiT(SMALL)
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
    save_model(MoEDiT(SMALL), path)
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged .*train\.py"):
        load(path)


def test_checkpoint_of_something_else_says_so(tmp_path):
    path = tmp_path / "other.safetensors"
    save_weights(Classifier(), path)
    with pytest.raises(CheckpointError, match="has no configuration of this model"):
        load_model(path)
    save_weights(Classifier(), path, config={"width": 32})
    with pytest.raises(CheckpointError, match="holds another model's weights"):
        load_model(path)
    save_weights(Classifier(), path, config={"groups": 2})
    with pytest.raises(CheckpointError, match="groups"):
        load_model(path)


def test_rounded_weights_come_back_in_the_models_own_dtype(tmp_path):
    torch.manual_seed(0)
    model, path = MoEDiT(SMALL), tmp_path / "half.safetensors"
    save_model(model, path, torch.float16)
    again = load_model(path)
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].dtype == torch.float32
        assert torch.equal(again.state_dict()[name], value.half().float())
    save_model(model, tmp_path / "whole.safetensors")
    assert path.stat().st_size < 0.6 * (tmp_path / "whole.safetensors").stat().st_size


def test_all_shipped_checkpoints_together_are_small():
    sizes = [path.stat().st_size for testbed in TESTBEDS for path in testbed.folder.glob("*.safetensors")]
    assert len(sizes) == 6 and sum(sizes) < 25e6


@pytest.mark.parametrize("testbed", TESTBEDS, ids=lambda testbed: testbed.name)
def test_the_shipped_classifier_knows_held_out_images(testbed: Testbed):
    held_out = testbed.load_split()[1]
    assert agreement(testbed.load_classifier(), held_out.images, held_out.labels) > KNOWN[testbed.name]


@pytest.mark.parametrize("testbed", TESTBEDS, ids=lambda testbed: testbed.name)
def test_the_shipped_model_draws_the_requested_class_with_all_its_experts(testbed: Testbed):
    model, labels = testbed.load_model(), torch.arange(40) % 10
    with expert_load(model) as load:
        images = testbed.generate(model, labels, steps=10)
    assert agreement(testbed.load_classifier(), images, labels) >= DRAWN[testbed.name]
    cfg = testbed.config
    assert set(load()) == {f"blocks.{block}.mlp.gate" for block in range(cfg.moe_every - 1, cfg.depth, cfg.moe_every)}
    assert all(shares.min() > 0.16 / cfg.experts for shares in load().values())
