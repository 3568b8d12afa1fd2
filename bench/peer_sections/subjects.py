"""The models that are compared on, each with one sampling loop of Euler steps.

The testbeds have trained weights and their own sampler. The image transformers of diffusers have random weights, so
their pictures show how near a cache stays to the uncached model, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples.digits.testbed import DIGITS
from examples.families.common import randomize
from examples.mnist.testbed import MNIST
from examples.testbed.testbed import Testbed

Call = Callable[..., Any]
"""The model as the sampling loop calls it, whatever a tool has put around it."""


@dataclass(frozen=True)
class Subject:
    """A model and its sampling loop.

    Attributes:
        kind: which code of a tool's user fits it.
        make: a fresh model in evaluation mode, the same each time.
        sample: pictures (images, channels, height, width) from a seed, in `steps` calls at the times 1 - i / steps.
        probe: the path of a layer inside a block in the middle, which runs where that block is really computed.
        peak: the range of the pictures' values for the PSNR; None is that of the uncached pictures.
    """

    name: str
    kind: str
    steps: int
    images: int
    make: Callable[[], nn.Module]
    sample: Callable[[Call, int], Tensor]
    probe: str
    peak: float | None = None


def of_testbed(testbed: Testbed, steps: int = 50, images: int = 2) -> Subject:
    """With the testbed's own sampler and guidance: one call a step, of twice the images."""

    def sample(call: Call, seed: int) -> Tensor:
        labels = (torch.arange(images) + images * seed) % 10
        return testbed.generate(call, labels, seed=seed, steps=steps).clamp(-1, 1)

    probe = f"blocks.{testbed.config.depth // 2}.attn.qkv"
    return Subject(testbed.name, "testbed", steps, images, testbed.load_model, sample, probe, peak=2.0)


def euler(velocity: Callable[[Tensor, float], Tensor], x: Tensor, steps: int) -> Tensor:
    """Follow the flow from time 1 to time 0 in even steps."""
    for index in range(steps):
        x = x - velocity(x, 1 - index / steps) / steps
    return x


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hidream(
    steps: int = 20, images: int = 1, side: int = 16, width: int = 4, blocks: tuple[int, int] = (4, 8)
) -> Subject:
    """HiDream-I1: blocks of two streams, then of one, all with 4 experts. `width` is in heads of 64."""

    def make() -> nn.Module:
        from diffusers import HiDreamImageTransformer2DModel

        model = HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=blocks[0],
            num_single_layers=blocks[1],
            attention_head_dim=64,
            num_attention_heads=width,
            caption_channels=[96, 80],
            text_emb_dim=64,
            axes_dims_rope=(32, 16, 16),
            max_resolution=(side, side),
            llama_layers=[index % 2 for index in range(sum(blocks))],
            force_inference_output=True,
        )
        randomize(model, seed=0)
        return model.eval().requires_grad_(False)

    def sample(call: Call, seed: int) -> Tensor:
        texts = seeded(images, 16, 96, seed=1), seeded(2, images, 16, 80, seed=2), seeded(images, 64, seed=3)

        def velocity(x: Tensor, time: float) -> Tensor:
            return call(x, torch.full((images,), 1000 * time), *texts, return_dict=False)[0]

        return euler(velocity, seeded(images, 4, side, side, seed=100 + seed), steps)

    probe = f"single_stream_blocks.{blocks[1] // 2}.block.attn1.to_q"
    return Subject("hidream", "hidream", steps, images, make, sample, probe)


def nucleus(steps: int = 20, images: int = 1, side: int = 12, width: int = 4, blocks: int = 12) -> Subject:
    """Nucleus-Image: three dense blocks, then experts that choose their tokens, and a dense block at the end."""

    def make() -> nn.Module:
        from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformer2DModel

        model = NucleusMoEImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=blocks,
            attention_head_dim=64,
            num_attention_heads=width,
            num_key_value_heads=max(1, width // 2),
            joint_attention_dim=96,
            axes_dims_rope=(16, 24, 24),
            num_experts=8,
            moe_intermediate_dim=256,
            capacity_factors=2.0,
        )
        randomize(model, seed=0)
        return model.eval().requires_grad_(False)

    def sample(call: Call, seed: int) -> Tensor:
        text = seeded(images, 16, 96, seed=1)

        def velocity(x: Tensor, time: float) -> Tensor:
            given = {"encoder_hidden_states": text, "timestep": torch.full((images,), time), "return_dict": False}
            return call(x, [(1, side, side)], **given)[0]

        tokens = euler(velocity, seeded(images, side**2, 16, seed=100 + seed), steps)
        return tokens.transpose(1, 2).reshape(images, 16, side, side)

    return Subject("nucleus", "nucleus", steps, images, make, sample, f"transformer_blocks.{blocks // 2}.attn.to_q")


SUBJECTS: dict[str, Subject] = {
    each.name: each for each in (of_testbed(DIGITS), of_testbed(MNIST), hidream(), nucleus())
}
