"""The mnist testbed: patches, the sizes that it is there for, and that capture finds all of it to cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

import moeca_compile
from examples.mnist.testbed import MNIST
from examples.testbed.model import MoEDiT, SparseMoE
from tests.digits import untrained

SMALL = replace(MNIST.config, width=32, depth=2, heads=1, experts=7, expert_width=8)


def test_sizes():
    config = MNIST.load_model().cfg
    assert config == MNIST.config
    assert (config.image_size, config.experts, config.experts_per_token) == (28, 48, 5) and config.depth >= 8
    layers = [module for module in MoEDiT(config).modules() if isinstance(module, SparseMoE)]
    assert len(layers) == config.depth // 2 and all(len(layer.experts) == 48 for layer in layers)


def test_a_token_is_a_patch_in_reading_order():
    model, images = untrained(SMALL), torch.arange(2 * 28 * 28.0).reshape(2, 1, 28, 28)
    patches = model.patches(images)
    assert patches.shape == (2, 49, 16)
    assert torch.equal(patches[1, 9], images[1, 0, 4:8, 8:12].flatten())  # second row, third column
    assert torch.equal(model.image(patches), images)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", ["moeca", "auto"])
def test_everything_is_found_and_cached(recipe: str, traced_once: None):
    model, steps = untrained(SMALL), 4
    x, y = torch.randn(2, 1, 28, 28), torch.tensor([3, 10])
    options = {"recipe": recipe, "lowering": "eager"}
    compiled = torch.compile(model, backend="moeca", options=options)
    with torch.no_grad(), moeca_compile.generation(steps=steps):
        for step in range(steps):
            t = torch.full((2,), 1 - step / steps)
            out = compiled(x, t, y)
            assert step or torch.allclose(out, model(x, t, y), atol=1e-5)
    report = moeca_compile.report(compiled)
    assert Counter((region.kind, region.status) for region in report.regions) == {
        ("router", "cached"): 1, ("experts", "cached"): 1, ("attention", "cached"): 2, ("feedforward", "cached"): 2,
    }  # fmt: skip
    assert report.steps["full"] < steps and sum(report.steps.values()) == steps
