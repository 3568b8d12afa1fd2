"""Diffusion transformers of the published families, implemented from their papers, with random weights.

    families.build("DSMoE-S-E16")                       # a published size, in eval mode
    families.build("DiT-MoE-XL", device="meta")         # shapes without data
    families.reduced("EC-DiT")                          # a few narrow blocks with the family's own routing

Each family has its file and is built from the parts of examples/dit.py. All models take forward(x (B, C, H, W), t
(B,), y (B,)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from examples.dit import DiffusionTransformer, Sizes
from examples.families import dense, diff_moe, diffmoe, dit_moe, dsmoe, expert_choice, token_choice
from examples.families.common import Family, randomize

FAMILIES: dict[str, Family] = {
    "DiT": dense.FAMILY,
    "DSMoE": dsmoe.FAMILY,
    "DiT-MoE": dit_moe.FAMILY,
    "Diff-MoE": diff_moe.FAMILY,
    "TC-DiT": token_choice.FAMILY,
    "EC-DiT": expert_choice.FAMILY,
    "DiffMoE": diffmoe.FAMILY,
}
PUBLISHED: dict[str, tuple[Family, Sizes]] = {
    name: (family, sizes) for family in FAMILIES.values() for name, sizes in family.published.items()
}


def build(name: str, device: str = "cpu", seed: int = 0) -> DiffusionTransformer:
    """A published model by its name. Raises KeyError for a name that is not in PUBLISHED."""
    family, sizes = PUBLISHED[name]
    return assemble(family, sizes, device, seed)


def reduced(family: str, device: str = "cpu", seed: int = 0) -> DiffusionTransformer:
    """The small form of a family. Raises KeyError for a name that is not in FAMILIES."""
    return assemble(FAMILIES[family], FAMILIES[family].reduced, device, seed)


def assemble(family: Family, sizes: Sizes, device: str = "cpu", seed: int = 0) -> DiffusionTransformer:
    """A model of a family with any sizes, in eval mode. Weights are random by the seed; the meta device has none."""
    with torch.device(device):
        model = family.model(sizes)
    if device != "meta":
        randomize(model, seed)
    return model.eval().requires_grad_(False)


def inputs_for(model: DiffusionTransformer, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Noise (B, C, H, W), one timestep for all samples (B,) and labels (B,), on the model's device."""
    sizes, generator = model.sizes, torch.Generator().manual_seed(seed)
    x = torch.randn(batch, sizes.channels, sizes.side, sizes.side, generator=generator)
    y = torch.randint(sizes.classes, (batch,), generator=generator)
    device = next(model.parameters()).device
    return x.to(device), torch.full((batch,), 900.0, device=device), y.to(device)
