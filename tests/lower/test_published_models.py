"""In 16 bits, rounding raises no alarm on the published models, whatever the weights and inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from examples import families
from tests.lower.low_precision import LowPrecision, with_wide_intermediates

SIZES = {
    "DSMoE-S-E16": 3,
    "DSMoE-S-E48": 3,
    "DiT-MoE-S": 2,
    "Diff-MoE-S": 2,
    "DiffMoE-S-E16": 2,
}
"""Published widths, experts and routing, with so many blocks and 64 tokens an image, as CPUs are slow in 16 bits."""
FAMILIES = ["DiT", "TC-DiT", "EC-DiT"]
"""Published families whose smallest models are large, in their reduced form."""
SEEDS = 20


def model_of(name: str) -> families.DiffusionTransformer:
    if name in FAMILIES:
        return families.reduced(name)
    family, sizes = families.PUBLISHED[name]
    return families.assemble(family, replace(sizes, depth=SIZES[name], side=16))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*SIZES, *FAMILIES])
def test_rounding_raises_no_alarm(name, dtype, recwarn):
    model = LowPrecision.of(model_of(name), dtype, "fora" if name == "DiT" else "moeca")
    steps = {kind: model.step(kind, with_wide_intermediates) for kind in model.kinds()}
    for seed in range(SEEDS):
        found, notes = model.regions(seed)
        assert found.skipped == model.compiled.regions.skipped, (seed, notes.warnings)
        assert notes.warnings == []
        for kind, step in steps.items():
            sound, notes = model.same(kind, step, seed)
            assert sound, (seed, kind.name, notes.warnings)
